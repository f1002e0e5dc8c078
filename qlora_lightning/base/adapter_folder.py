"""An adapter folder as files: where it is, and the identity of what it belongs to."""

from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, IDENTITY, read_json_object
from qlora_lightning.support.versions import check_version

_REMEDY = "Copy the adapter folder again."


def find_adapter_folder(named: str | Path) -> Path:
    """Return the adapter folder inside ``named`` if that is a run folder; any other folder as it is."""
    folder = Path(named).expanduser()
    inner = folder / ADAPTER_FOLDER
    is_run = not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file()
    return inner if is_run else folder


def read_identity(folder: Path) -> dict[str, Any]:
    """Check an adapter folder and read its identity, which is empty if another tool wrote the folder."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not an adapter folder: there is no {name} in it.")
    read_adapter_config(folder)  # reports its faults before a base is loaded
    if not (folder / IDENTITY).is_file():
        return {}
    identity = read_json_object(folder / IDENTITY, _REMEDY)
    check_version(identity.get("format_version", 1), f"The adapter folder {folder}")
    return {name: value for name, value in identity.items() if value is not None}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of an adapter folder."""
    config = read_json_object(folder / "adapter_config.json", _REMEDY)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise UserError(f"{folder} holds an adapter of peft_type {peft_type}: expected LORA.")
    return config
