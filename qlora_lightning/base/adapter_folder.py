"""An adapter folder as files: where it lies, and what it says it belongs to."""

from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import Positive, Shape, check_shape, read_json_object
from qlora_lightning.support.versions import check_version

ALPHA = Positive(float, 1_000_000)  # more overflows in what is computed with it, and nobody trains with more
_RANK = Positive(int, 65_536)
PATTERNS: dict[str, Any] = {"rank_pattern": {"*!": _RANK}, "alpha_pattern": {"*!": ALPHA}}
"""Of the two among the LoRA options that give some modules another rank or alpha."""
_SHAPE_OF_LORA: Shape = {
    "rank": int,
    "alpha": float,
    "dropout": float,
    "target_modules": [str],
    "layers": [int],
    "lora_options": {},
}
IDENTITY: Shape = {
    "format_version": int,
    "base": str,
    "base_folder": str,
    "revision": str,
    "fingerprint": str,
    "config_hash": str,
    "quantization": ("nf4", "fp4", "int8", "none"),
    "double_quant": bool,
    "compute_dtype": ("bfloat16", "float16", "float32"),
    "adapter": _SHAPE_OF_LORA,
    "data": {"tokenizer": str, "chat_template": str, "train": str, "val": str, "settings": {"system": str}},
    "trained_from": {"adapter": str, "data": {}},
}
"""Of ``qlora_lightning.json``."""
CONFIG: Shape = {
    "base_model_name_or_path": str,
    "r!": _RANK,
    "lora_alpha!": ALPHA,
    "lora_dropout": float,
    "target_modules": (str, [str]),
    "layers_to_transform": (int, [int]),
    "modules_to_save": [str],
    "use_dora": bool,
    "use_rslora": bool,
    **PATTERNS,
}
"""Of PEFT's ``adapter_config.json``."""


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


def find_adapter_folder(named: str | Path) -> Path:
    """Give the adapter folder itself where the run folder around it was named; any other folder as it is."""
    folder = Path(named).expanduser()
    inner = folder / "adapter"
    is_run = not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file()
    return inner if is_run else folder


def find_run_config(adapter: Path) -> Path | None:
    """Give the ``config.yaml`` of the run folder around an adapter folder, where there is one."""
    beside = adapter.absolute().parent / "config.yaml"
    return beside if beside.is_file() else None
