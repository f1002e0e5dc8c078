"""An adapter folder as files: where it is, and what it says it belongs to."""

from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, IDENTITY, read_json_object
from qlora_lightning.support.versions import check_version

_REMEDY = "Copy the adapter folder again."
_TYPES = {
    **dict.fromkeys(("base", "revision", "fingerprint", "config_hash", "quantization", "compute_dtype"), str),
    **{"format_version": int, "double_quant": bool, "adapter": dict, "data": dict},
}  # of what qlora_lightning.json says
_CHOICES = {
    "quantization": ("nf4", "fp4", "int8", "none"),
    "compute_dtype": ("bfloat16", "float16", "float32"),
}


def read_identity(folder: Path) -> dict[str, Any]:
    """Check an adapter folder, and read what it says it belongs to; nothing if other tools wrote it."""
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not an adapter folder: expected adapter_config.json and adapter_model.safetensors in it, "
            f"missing {' and '.join(missing)}."
        )
    read_adapter_config(folder)  # its faults are reported before a base is loaded
    file = folder / IDENTITY
    if not file.is_file():
        return {}
    identity = {name: value for name, value in read_json_object(file, _REMEDY).items() if value is not None}
    for name, kind in _TYPES.items():
        _check_value(file, name, identity.get(name), kind)
    for name in ("settings", "samples"):
        _check_value(file, f"data.{name}", identity.get("data", {}).get(name), dict)
    for name, count in identity.get("data", {}).get("samples", {}).items():
        _check_value(file, f"data.samples.{name}", count, int)
    for name, choices in _CHOICES.items():
        if identity.get(name, choices[0]) not in choices:
            raise UserError(f"{file}: {name} is {identity[name]!r}, expected one of {', '.join(choices)}. {_REMEDY}")
    check_version(identity.get("format_version", 1), f"The adapter folder {folder}")
    return identity


def _check_value(file: Path, name: str, value: Any, kind: type) -> None:
    if value is not None and type(value) is not kind:
        raise UserError(f"{file}: {name} must be {kind.__name__}, found {type(value).__name__}. {_REMEDY}")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of an adapter folder."""
    config = read_json_object(folder / "adapter_config.json", _REMEDY)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} holds an adapter of peft_type {kind}: expected LORA.")
    _check_value(folder / "adapter_config.json", "base_model_name_or_path", config.get("base_model_name_or_path"), str)
    return config


def find_adapter_folder(named: str | Path) -> Path:
    """Return the adapter folder itself if the run folder around it was named; any other folder as it is."""
    folder = Path(named).expanduser()
    inner = folder / ADAPTER_FOLDER
    is_run = not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file()
    return inner if is_run else folder


def find_run_config(adapter: Path) -> Path | None:
    """Return the ``config.yaml`` of the run folder around an adapter folder; None if there is none."""
    beside = adapter.absolute().parent / CONFIG
    return beside if beside.is_file() else None
