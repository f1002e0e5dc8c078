"""What an adapter belongs to: its base, its own shape, and the data that it was trained on."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import peft

from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of

# What a model computes beside its tensors. Names, dtypes and versions of tools differ between copies of one base.
_COMPUTES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_activation"),
    *("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "no_rope_layers"),
)
# Options of PEFT that change the adapter's shape or function; the others, as the initialization, are of the past.
_OPTIONS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")
_OF_BASE = {"fingerprint": "weights", "config_sha256": "config"}
_SETTINGS = ("quantization", "double_quant", "rank", "alpha", "target_modules", "layers", "lora_options")
_DATA = {
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "train": "training samples",
    "val": "validation samples",
}


def hash_config(config: Any) -> str:
    """Hash what a transformers config says of the function that a model computes."""
    values = {name: value for name in _COMPUTES if (value := getattr(config, name, None)) is not None}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def describe_adapter(model: peft.PeftModel) -> dict[str, Any]:
    """Return rank, alpha, dropout, targets, layers and options of the adapter as plain values.

    Targets and layers are read off the modules that carry it, however they were chosen.
    """
    config = model.peft_config[ADAPTER]
    modules = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    options = {name: value for name in _OPTIONS if (value := getattr(config, name))}
    if "modules_to_save" in options:
        options["modules_to_save"] = sorted(options["modules_to_save"])
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "layers": sorted({layer for name in modules if (layer := layer_of(name)) is not None}),
        "lora_options": options,
    }


def identity_of_data(trainer: Any) -> dict[str, Any]:
    """Return what the trainer's data module says of its rows, tokenizer and template, if it does."""
    return dict(getattr(datamodule_of(trainer), "identity", None) or {})


def check_identity(stored: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Reject an adapter of another base or another shape: it would load without an error and answer nonsense.

    What one of the two does not know is not compared.
    """
    theirs, mine = ({**each, **(each.get("adapter") or {})} for each in (stored, own))
    for name in (*_OF_BASE, *_SETTINGS):
        if not _differ(theirs, mine, name):
            continue
        if name == "double_quant" and mine.get("quantization") not in ("nf4", "fp4"):  # which alone have such scales
            continue
        there, here = _short(theirs[name]), _short(mine[name])
        if name in _OF_BASE:
            part = _OF_BASE[name]
            raise UserError(
                f"{source} was trained on another base: {stored.get('base')} ({part} {there}) there, "
                f"{own.get('base')} ({part} {here}) here. Name its base by model.base or --base."
            )
        raise UserError(
            f"{source} was trained with model.{name} {there}, but here it is {here}. Set model.{name} to {there}, or "
            "train a new adapter."
        )


def data_differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """Describe, by name, what differs between two identities of data: in counts of samples, or in hashes."""
    differences = {}
    for name, words in _DATA.items():
        if _differ(stored, own, name):
            then, now = (_short(each.get("samples", {}).get(name, each[name])) for each in (stored, own))
            differences[name] = f"{words} ({then} there, {now} here)"
    return differences


def _differ(stored: Mapping[str, Any], own: Mapping[str, Any], name: str) -> bool:
    return stored.get(name) is not None and own.get(name) is not None and stored[name] != own[name]


def _short(value: Any) -> str:
    """Format a hash by its first digits, anything else as YAML would have it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text
