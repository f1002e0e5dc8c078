"""What an adapter belongs to, and whether what a user asks for contradicts it."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft

from qlora_lightning.model.adapters.lora import ADAPTER, add_adapters
from qlora_lightning.model.adapters.targets import layer_of, resolve_targets
from qlora_lightning.support.errors import UserError

# What a model computes beside its tensors. Names, dtypes and versions of tools differ between copies of one base.
_COMPUTES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
)
# Of families beside LLaMA, hashed if they are set: hashes of earlier versions stay.
_COMPUTES_TOO = (
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_activation"),
    *("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "no_rope_layers"),
)
# Options of PEFT that change the adapter's shape or function; the others, as the initialization, are of the past.
_OPTIONS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")
_OF_BASE = {"fingerprint": "weights", "config_hash": "config"}
_SETTINGS = ("quantization", "double_quant", "rank", "alpha", "target_modules", "layers", "lora_options")
_DATA = {
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "train": "training samples",
    "val": "validation samples",
}


def hash_config(config: Any) -> str:
    """Hash what a transformers config says of the function that a model computes."""
    values = {name: getattr(config, name, None) for name in _COMPUTES}
    values |= {name: value for name in _COMPUTES_TOO if (value := getattr(config, name, None)) is not None}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def describe_adapter(model: peft.PeftModel, adapter: str = ADAPTER) -> dict[str, Any]:
    """Return rank, alpha, dropout, targets, layers and options of an adapter as plain values.

    Targets and layers are read off the modules that carry it, however they were chosen.
    """
    config = model.peft_config[adapter]
    found = (name.partition(".lora_") for name, _ in model.named_parameters())
    names = [module for module, _, tensor in found if adapter in tensor.split(".")]
    options = {name: value for name in _OPTIONS if (value := getattr(config, name))}
    if "modules_to_save" in options:
        options["modules_to_save"] = sorted(options["modules_to_save"])
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        **_summarize_targets(names),
        "lora_options": options,
    }


def _summarize_targets(names: list[str]) -> dict[str, Any]:
    layers = {layer for name in names if (layer := layer_of(name)) is not None}
    return {"target_modules": sorted({name.rpartition(".")[2] for name in names}), "layers": sorted(layers)}


def identity_of_data(trainer: Any) -> dict[str, Any]:
    """Return what the trainer's data module says of its rows, tokenizer and template, if it does."""
    identity = getattr(getattr(trainer, "datamodule", None), "identity", None)
    return dict(identity) if isinstance(identity, Mapping) else {}


def check_identity(stored: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Reject an adapter of another base or another shape: it would load without an error and answer nonsense.

    What one of the two does not know is not compared.
    """
    theirs, mine = ({**each, **(each.get("adapter") or {})} for each in (stored, own))
    for name in (*_OF_BASE, *_SETTINGS):
        scales = name == "double_quant"  # which only 4-bit weights have
        if not _differ(theirs, mine, name) or (scales and own.get("quantization") not in ("nf4", "fp4")):
            continue
        there, here = _short(theirs[name]), _short(mine[name])
        if name in _OF_BASE:
            part = _OF_BASE[name]
            raise UserError(
                f"{source} was trained on another base: {stored.get('base')} ({part} {there}) there, {own.get('base')} "
                f"({part} {here}) here. Name the base that it was trained on, by model.base and model.revision, or by "
                "--base if a command has that."
            )
        raise UserError(
            f"{source} was trained with model.{name} {there}, but here it is {here}. Set model.{name} to {there}, or "
            "train a new adapter."
        )


def data_differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """Describe, by name, what differs between two identities of data: in counts of samples, or in hashes."""
    found = {}
    for name, words in _DATA.items():
        if _differ(stored, own, name):
            then, now = (each.get("samples", {}).get(name) for each in (stored, own))
            if then is None or now is None:
                sides = f"{_short(stored[name])} there, {_short(own[name])} here"
            elif then == now:
                sides = f"{now:,} there and here, not the same or in another order"
            else:
                sides = f"{then:,} there, {now:,} here"
            found[name] = f"{words} ({sides})"
    return found


def _differ(stored: Mapping[str, Any], own: Mapping[str, Any], name: str) -> bool:
    return stored.get(name) is not None and own.get(name) is not None and stored[name] != own[name]


def _short(value: Any) -> str:
    """Format a hash by its first digits, anything else as YAML would have it."""
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(r"[0-9a-f]{40,}", text):
        return text[:12]
    return text if len(text) <= 80 else f"{text[:77]}…"


def check_adapter_options(model: peft.PeftModel, options: dict[str, Any], folder: Path) -> None:
    """Reject options that contradict the adapter that training continues with: they would be ignored.

    ``options`` are those of :func:`~qlora_lightning.model.adapters.lora.add_adapters`; defaults contradict nothing.
    """
    defaults = inspect.signature(add_adapters).parameters
    asked = {name: value for name, value in options.items() if value != defaults[name].default}
    stored = describe_adapter(model)
    chosen = asked
    if {"target_modules", "layers"} & asked.keys():
        targets = resolve_targets(model.get_base_model(), options["target_modules"], options["layers"])
        chosen = {**asked, **_summarize_targets(targets)}
    found = [(name, value, chosen[name], stored[name]) for name, value in asked.items() if name != "lora_options"]
    for name, value in (asked.get("lora_options") or {}).items():
        if name in _OPTIONS:
            found.append((f"lora_options.{name}", value, value or None, stored["lora_options"].get(name)))
    for name, value, new, old in found:
        if new != old:
            raise UserError(
                f"model.{name} is {value}, but the adapter in {folder} has {old}, and training continues with that: "
                f"leave model.{name} out, or train a new adapter without model.adapter."
            )
