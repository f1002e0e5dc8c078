"""Keeps away what Lightning says of itself, where a command has a report of its own."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep away what a fit says of its devices, its data and its end."""
    loggers = {name: logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
