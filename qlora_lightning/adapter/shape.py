"""The types of what an adapter folder says in JSON, as far as it is read."""

from typing import Any

from qlora_lightning.json_shape import Positive, Shape

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
