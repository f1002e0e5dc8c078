"""Adapter folders on a command line: their names, and what their run's config, or the folder itself, says."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.base.adapter_folder import (
    find_adapter_folder,
    find_run_config,
    read_adapter_config,
    read_identity,
)
from qlora_lightning.commands.config import find_configs
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER

BASE = "base"  # the side without an adapter
_RENDERING = ("system", "train_on", "max_length", "too_long")  # settings of the training that other rows share


def name_adapters(
    values: Sequence[str], reserved: Collection[str] = (BASE,), single: str | None = None
) -> dict[str, Path]:
    """Return adapter folders by name: each value is ``NAME=DIR``, or ``DIR``, which is named after its run folder.

    Args:
        values: as they were typed.
        reserved: names that no adapter may have.
        single: the name of the only adapter, if it has none.

    Raises:
        UserError: a folder holds no adapter, or a name is reserved or used twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or "/" in name or Path(value).expanduser().exists():
            whole = Path(value).expanduser().absolute()
            name, folder = (whole.parent if whole.name == ADAPTER_FOLDER else whole).name, value
            if single is not None and len(values) == 1:
                name = single
        if not name or name in reserved or name in found:
            raise UserError(f"--adapter {value}: expected DIR or NAME=DIR with a new name, but {name!r} is taken.")
        found[name] = find_adapter_folder(folder)
        read_identity(found[name])
    return found


def add_config(adapter: Path | None, arguments: Sequence[str], needs_rows: bool = True) -> list[str]:
    """Return options of ``fit`` with the config of an adapter's run in front, unless they name a config themselves.

    Raises:
        UserError: ``needs_rows``, and nothing names rows; or the folder is no adapter folder.
    """
    if adapter is None or find_configs(arguments):
        return list(arguments)
    identity = read_identity(adapter)
    config = find_run_config(adapter)
    if config is not None:
        return ["--config", os.path.relpath(config), *arguments]
    if needs_rows and not any(each.startswith("--data") for each in arguments):
        raise UserError(
            f"Nothing names the rows: there is no config.yaml beside the adapter folder {adapter}. Add --config FILE "
            "or --data.val FILE."
        )
    return ["--config", json.dumps(_settings_of(adapter, identity)), *arguments]


def _settings_of(adapter: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what the folder itself holds on its base and on how its rows were rendered, in the form of a config."""
    names = ("revision", "quantization", "double_quant")
    model = {name: identity[name] for name in names if identity.get(name) is not None}
    loaded_from = str(read_adapter_config(adapter).get("base_model_name_or_path"))
    base = str(identity.get("base") or loaded_from)
    is_path = identity.get("revision") is None and not base.startswith("package:")  # a hub id has a revision
    is_lost = is_path and not Path(base).expanduser().exists()
    model["base"] = loaded_from if is_lost else base  # a path is relative to where it was trained
    if identity.get("compute_dtype") == "float32":
        model["compute_dtype"] = "fp32"
    trained = (identity.get("data") or {}).get("settings") or {}
    data = {name: trained[name] for name in _RENDERING if trained.get(name) is not None}
    if (adapter / "tokenizer_config.json").is_file():
        data["tokenizer"] = str(adapter)  # with the chat template of the training
    return {"model": model, "data": data}
