"""The types of what an adapter folder says in JSON, as far as it is read."""

from qlora_lightning.json_shape import Shape

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
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "target_modules": (str, [str]),
    "layers_to_transform": (int, [int]),
    "modules_to_save": [str],
    "rank_pattern": {"*": int},
    "alpha_pattern": {"*": float},
    "use_dora": bool,
    "use_rslora": bool,
}
"""Of PEFT's ``adapter_config.json``."""
