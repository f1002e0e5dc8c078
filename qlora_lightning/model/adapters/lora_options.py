"""What ``model.lora_options`` may hand to ``peft.LoraConfig``, and why the rest is refused."""

import dataclasses
import difflib
from typing import Any

import peft
from torch import nn

from qlora_lightning.adapter.shape import PATTERNS
from qlora_lightning.errors import UserError
from qlora_lightning.json_shape import find_fault

OURS = {
    "r": "model.rank",
    "lora_alpha": "model.alpha",
    "lora_dropout": "model.dropout",
    "target_modules": "model.target_modules",
    "exclude_modules": "model.target_modules",
    "layers_to_transform": "model.layers",
    "layers_pattern": "model.layers",
    "base_model_name_or_path": "model.base",
    "revision": "model.revision",
}
_ALLOWED = {
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
}
_ALLOWED_INITS = (True, False, "gaussian", "orthogonal")
_REWRITES_BASE = "it rewrites the frozen base's own weights, and the adapter would then fit no other copy of the base"
_NEEDS_DATA = "it needs a pass over data before training, which this framework does not make"
_REFUSED_INITS = {
    "pissa": _REWRITES_BASE,
    "olora": _REWRITES_BASE,
    "corda": f"{_REWRITES_BASE}; also {_NEEDS_DATA}",
    "loftq": f"it needs the weights before quantization; also {_REWRITES_BASE}",
    "lora_ga": f"{_REWRITES_BASE}; also {_NEEDS_DATA}",
    "eva": _NEEDS_DATA,
    "mica": "it needs the weights before quantization",
}


def check_lora_options(options: dict[str, Any], model: nn.Module, tied_embeddings: bool) -> None:
    """Refuse options that cannot work on a frozen, quantized base, each with its reason.

    Args:
        options: What the user wrote under ``model.lora_options``.
        model: The base, without adapters.
        tied_embeddings: Whether the head shares the embedding's weight.

    Raises:
        UserError: An option is unknown, has its own key, or cannot work.
    """
    for name, value in options.items():
        _check_name(name)
        if name == "init_lora_weights":
            _check_init(value, model)
    fault = find_fault(options, PATTERNS, "model.lora_options")
    if fault:
        raise UserError(f"{fault}.")
    modules = options.get("modules_to_save") or []
    for module in modules:
        _check_module_to_save(module, model)
    if tied_embeddings and {"embed_tokens", "lm_head"} & set(modules) and not options.get("ensure_weight_tying"):
        raise UserError(
            f"model.lora_options.modules_to_save is {modules}, but this base ties head and embedding: trained alone "
            "they would part. Add `ensure_weight_tying: true` with modules_to_save: [embed_tokens], "
            "or train single tokens with trainable_token_indices."
        )


def _check_name(name: str) -> None:
    if name in OURS:
        raise UserError(f"model.lora_options sets {name!r}, which has a key of its own: set {OURS[name]}.")
    if name in _ALLOWED:
        return
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if name in known:
        raise UserError(
            f"model.lora_options sets {name!r}: refused, since it is not verified on a frozen, quantized base. "
            f"Options that are: {', '.join(sorted(_ALLOWED))}."
        )
    nearest = difflib.get_close_matches(name, _ALLOWED, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(sorted(_ALLOWED))}."
    raise UserError(f"model.lora_options has {name!r}, which peft.LoraConfig does not know.{hint}")


def _check_init(value: Any, model: nn.Module) -> None:
    if value == "orthogonal" and any(_is_quantized(module) for module in model.modules()):
        raise UserError(
            "model.lora_options.init_lora_weights is 'orthogonal': refused on a quantized base, since PEFT makes the "
            "matrices in the dtype in which the weights are stored, and integers have no gradient."
        )
    if value in _ALLOWED_INITS:
        return
    for name, reason in _REFUSED_INITS.items():
        if str(value).lower().startswith(name):
            raise UserError(f"model.lora_options.init_lora_weights is {value!r}: refused, since {reason}.")
    raise UserError(
        f"model.lora_options.init_lora_weights is {value!r}: expected one of "
        f"{', '.join(str(choice) for choice in _ALLOWED_INITS)}."
    )


def _check_module_to_save(name: str, model: nn.Module) -> None:
    matches = [module for full, module in model.named_modules() if full == name or full.endswith(f".{name}")]
    if not matches:
        raise UserError(f"model.lora_options.modules_to_save names {name!r}, but the base has no such module.")
    if any(_is_quantized(module) for module in matches):
        raise UserError(
            f"model.lora_options.modules_to_save names {name!r}, which is quantized: integers have no gradient. "
            "Put an adapter on it with model.target_modules instead."
        )


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear
