"""An adapter folder in place of a config: its run's config, or the settings in the folder itself."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.base.adapter_folder import find_run_config, read_adapter_config, read_identity
from qlora_lightning.commands.config import find_configs
from qlora_lightning.support.errors import UserError

_RENDERING = ("system", "train_on", "max_length", "too_long")  # what data settings of the training other rows share


def add_config(adapter: Path | None, arguments: Sequence[str], needs_rows: bool = True) -> list[str]:
    """Return options of ``fit`` with the config of an adapter's run in front, unless they name a config themselves.

    Without that config it is what the folder itself holds; if rows are needed, some ``--data`` option must name them.
    """
    if adapter is None or find_configs(arguments):
        return list(arguments)
    identity = read_identity(adapter)
    config = find_run_config(adapter)
    if config is not None:
        return ["--config", os.path.relpath(config), *arguments]
    if needs_rows and not any(each.startswith("--data") for each in arguments):
        raise UserError(
            f"Which rows? There is no config.yaml beside the adapter folder {adapter} that names them: give "
            "--config FILE, or --data.val FILE."
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
