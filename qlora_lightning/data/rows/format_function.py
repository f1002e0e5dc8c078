"""A format of the user's own: a function ``row -> conversation``, named by its dotted path."""

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError


def import_function(path: str) -> Callable[[dict[str, Any]], Any]:
    """Import a function by its dotted path; a module in the current folder is found as well.

    Raises:
        UserError: if the module cannot be imported, or what it holds under that name is no function.
    """
    module_name, _, name = path.rpartition(".")
    folder = str(Path.cwd())
    sys.path.append(folder)  # an installed command does not look there, where people keep their function
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"format: cannot import {module_name!r} for {path!r}: {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, dir(module), n=1)
        raise UserError(f"format: {module_name} has no {name!r}{f'; did you mean {near[0]!r}?' if near else '.'}")
    if not callable(function):
        raise UserError(f"format: {path} is {type(function).__name__}, not a function row -> conversation.")
    return function  # type: ignore[no-any-return]
