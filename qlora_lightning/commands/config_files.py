"""The configs that a command line names by ``--config``."""

import os
from collections.abc import Sequence

from qlora_lightning.support.errors import UserError

SUFFIXES = (".yaml", ".yml", ".json")


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Give what stands behind each ``--config`` and ``-c``, as it was typed."""
    found, awaited = [], False
    for argument in arguments:
        if awaited:
            found.append(argument)
        elif argument.startswith("--config="):
            found.append(argument.partition("=")[2])
        awaited = not awaited and argument in ("--config", "-c")
    return found


def check_configs(arguments: Sequence[str]) -> None:
    """Refuse a config that is not there, before a second is spent.

    Raises:
        UserError: A name leads nowhere, or to a folder.
    """
    for name in find_configs(arguments):
        place = os.path.expanduser(name)
        if os.path.isdir(place):
            inner = os.path.join(name, "config.yaml")
            remedy = inner if os.path.isfile(os.path.join(place, "config.yaml")) else "a YAML file"
            raise UserError(f"--config names {name}, which is a folder: name {remedy}.")
        if place.endswith(SUFFIXES) and not os.path.exists(place):
            raise UserError(
                f"--config names {name}, but there is no such file. Paths are relative to the current folder."
            )
