"""An adapter folder as files: where it is, and what it says it belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, IDENTITY, read_json_object
from qlora_lightning.support.versions import check_version

_REMEDY = "Copy the adapter folder again."
_STRINGS = ("base", "revision", "fingerprint", "quantization", "compute_dtype")
_TYPES = {**dict.fromkeys(_STRINGS, str), "format_version": int, "double_quant": bool, "adapter": dict, "data": dict}
_CHOICES = {"quantization": ("nf4", "fp4", "int8", "none"), "compute_dtype": ("bfloat16", "float16", "float32")}


def find_adapter_folder(named: str | Path) -> Path:
    """Return the adapter folder itself if the run folder around it was named; any other folder as it is."""
    folder = Path(named).expanduser()
    inner = folder / ADAPTER_FOLDER
    is_run = not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file()
    return inner if is_run else folder


def read_identity(folder: Path) -> dict[str, Any]:
    """Check an adapter folder, and read what it says it belongs to; nothing if other tools wrote it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not an adapter folder: there is no {name} in it.")
    read_adapter_config(folder)  # its faults are reported before a base is loaded
    if not (folder / IDENTITY).is_file():
        return {}
    stored = read_json_object(folder / IDENTITY, _REMEDY)
    identity = {name: value for name, value in stored.items() if value is not None}
    file = folder / IDENTITY
    _check_types(file, identity, _TYPES)
    _check_types(file, identity.get("data", {}), {"settings": dict, "samples": dict})
    for name, choices in _CHOICES.items():
        if identity.get(name, choices[0]) not in choices:
            raise UserError(f"{file}: {name} is {identity[name]!r}, expected one of {', '.join(choices)}. {_REMEDY}")
    check_version(identity.get("format_version", 1), f"The adapter folder {folder}")
    return identity


def _check_types(file: Path, content: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for name, expected in types.items():
        value = content.get(name)
        if value is not None and type(value) is not expected:
            raise UserError(f"{file}: {name} must be {expected.__name__}, found {type(value).__name__}. {_REMEDY}")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of an adapter folder."""
    config = read_json_object(folder / "adapter_config.json", _REMEDY)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} holds an adapter of peft_type {kind}: expected LORA.")
    _check_types(folder / "adapter_config.json", config, {"base_model_name_or_path": str})
    return config
