"""A module made again from a checkpoint, without a Trainer."""

import inspect
from pathlib import Path
from typing import Any

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.model.adapters.identity import check_identity
from qlora_lightning.model.checkpoint.format import read_checkpoint, read_content, usable_settings
from qlora_lightning.support.errors import UserError


def restore_module(kind: type, file: str | Path, map_location: Any, overrides: dict[str, Any]) -> Any:
    """Make a module of a class by the settings, the base and the adapter of a checkpoint.

    Raises:
        UserError: The file is no checkpoint or a foreign one, or belongs to another base.
    """
    checkpoint = read_checkpoint(file, map_location)
    content = read_content(checkpoint, str(file))
    parameters = inspect.signature(kind).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    known = content["settings"] if takes_any else parameters
    settings = {**usable_settings(content["settings"], known, kind.__name__), **overrides}
    start = settings.get("adapter")
    if start is not None and not find_adapter_folder(start).is_dir():
        own = {"adapter": None, **(content["identity"].get("adapter") or {})}
        raise UserError(
            f"{file} continues the adapter folder {start}, which is not there: pass its new place as adapter=…, or "
            f"{', '.join(f'{name}={value!r}' for name, value in own.items())}."
        )
    module: Any = kind(**settings)
    module.to(map_location)
    module.configure_model()
    check_identity(content["identity"], module.identity, str(file))
    module.load_state_dict(checkpoint["state_dict"])
    return module
