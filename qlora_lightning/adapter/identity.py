"""What an adapter folder says it belongs to."""

from pathlib import Path
from typing import Any

from qlora_lightning.adapter.shape import CONFIG, IDENTITY
from qlora_lightning.errors import UserError
from qlora_lightning.format_version import check_version
from qlora_lightning.json_file import check_shape, read_json_object

_REMEDY = "Copy the adapter folder again."


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what an adapter folder says it belongs to; nothing where other tools wrote the folder.

    Raises:
        UserError: The folder is not a whole adapter folder with a LoRA in it, or a newer version wrote it.
    """
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not an adapter folder: expected adapter_config.json and adapter_model.safetensors in it, "
            f"missing {' and '.join(missing)}."
        )
    read_adapter_config(folder)  # told here, before a base is loaded
    file = folder / "qlora_lightning.json"
    identity = read_json_object(file, _REMEDY) if file.is_file() else {}
    version = identity.get("format_version", 1)
    check_version(version if isinstance(version, int) else 0, f"The adapter folder {folder}")
    check_shape(file, identity, _REMEDY, IDENTITY)
    return {name: value for name, value in identity.items() if value is not None}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of an adapter folder that :func:`read_identity` has seen.

    Raises:
        UserError: It is not a JSON object, of another kind of adapter, or holds what no model can compute with.
    """
    file = folder / "adapter_config.json"
    config = read_json_object(file, _REMEDY)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} holds an adapter of peft_type {kind}: expected LORA.")
    check_shape(file, config, _REMEDY, CONFIG)
    return config
