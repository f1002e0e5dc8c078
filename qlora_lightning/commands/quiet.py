"""Keeps away what Lightning says of itself, where a command has a report of its own."""

import logging
from contextlib import AbstractContextManager

from qlora_lightning.support.console import quiet_loggers


def quiet_lightning() -> AbstractContextManager[None]:
    """Keep away what a fit says of its devices, its data and its end."""
    return quiet_loggers(logging.WARNING, "lightning.pytorch", "lightning.fabric")
