"""An adapter folder as files: where it is, and the identity of what it belongs to."""

from pathlib import Path
from typing import Any, Literal

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, IDENTITY, read_json_object
from qlora_lightning.support.versions import check_version

_REMEDY = "Correct it, or copy the adapter folder again."
_TEXT, _NAMES, _SWITCH = str | None, list[str] | str | None, bool | None
LORA_KEYS: dict[str, Any] = {  # what counts of an adapter_config.json
    **{"peft_type": Literal["LORA"], "r": int, "lora_alpha": float, "lora_dropout": float | None, "bias": _TEXT},
    **{"rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, float] | None},
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES),
    **dict.fromkeys(("modules_to_save", "target_parameters"), list[str] | None),
    **{"layers_to_transform": list[int] | int | None, "init_lora_weights": bool | str | None},
    **{"trainable_token_indices": list[int] | dict[str, list[int]] | None},
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), _SWITCH),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type"), _TEXT),
    # not supported, although they change what an adapter computes
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"), None),
    **dict.fromkeys(("megatron_config", "monteclora_config", "use_bdlora", "velora_config"), None),
    "use_qalora": Literal[False, None],
}
_IDENTITY: dict[str, Any] = {
    "quantization": Literal["nf4", "fp4", "int8", "none", None],
    "compute_dtype": Literal["bfloat16", "float16", "float32", None],
    **{"format_version": int | None, "double_quant": _SWITCH, "adapter": dict | None},
    **dict.fromkeys(("base", "revision", "fingerprint", "reference"), _TEXT),
    "data": {
        "samples": dict | None,
        "settings": {"max_length": int | None, **dict.fromkeys(("system", "train_on", "reasoning", "too_long"), _TEXT)},
    },
}


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
    identity = read_json_object(folder / IDENTITY, _REMEDY, _IDENTITY)
    check_version(identity.get("format_version") or 1, f"The adapter folder {folder}")
    return {name: value for name, value in identity.items() if value is not None}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of an adapter folder."""
    return read_json_object(folder / "adapter_config.json", _REMEDY, LORA_KEYS)
