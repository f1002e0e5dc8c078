"""The identity of an adapter: its base, its shape, and the data that it was trained on."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import peft

from qlora_lightning.model.adapters.inject import ADAPTER
from qlora_lightning.model.model_types import layer_of
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of

# PEFT options that change the adapter's shape or function. The others, such as the initialization, no longer matter.
_OPTIONS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")
_COMPARED = (
    *("fingerprint", "reference", "quantization", "double_quant"),
    *("rank", "alpha", "target_modules", "layers", "lora_options"),
)
_DATA = {"tokenizer": "tokenizer", "chat_template": "chat template"}
_DATA |= {"train": "training samples", "val": "validation samples"}


def describe_adapter(model: peft.PeftModel) -> dict[str, Any]:
    """Return rank, alpha, dropout, targets, layers and options of the adapter as plain values.

    Targets and layers are read from the modules that carry the adapter, however they were chosen.
    """
    config = model.peft_config[ADAPTER]
    adapters = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    modules = {name.removesuffix(".base_layer") for name in adapters}  # experts have two adapters, one inside the other
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
    """Return the data module's identity (its rows, tokenizer and template), or an empty dict if it has none."""
    return dict(getattr(datamodule_of(trainer), "identity", None) or {})


def check_identity(stored: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
    """Reject an adapter with another base or shape, because it would load without an error and generate nonsense."""
    flat_stored, flat_current = ({**identity, **(identity.get("adapter") or {})} for identity in (stored, current))
    for name, (before, now) in _differences(flat_stored, flat_current, _COMPARED).items():
        if name == "reference":
            raise UserError(
                f"{source} was trained against another reference: the adapter in model.adapter has changed since then "
                f"(its weights were {before}, and are now {now}). Restore it, or start a new run.",
                "adapter.reference",
            )
        if name == "fingerprint":
            raise UserError(
                f"{source} was trained on another base: {stored.get('base')} (weights {before}) there, "
                f"{current.get('base')} (weights {now}) here. Name its base by model.base or --base.",
                "adapter.base",
            )
        raise UserError(
            f"{source} was trained with model.{name} {before}, but here it is {now}. Set model.{name} to {before}, or "
            "train a new adapter.",
            f"model.{name}",
        )


def data_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Describe by name how two data identities differ, with their sample counts or hashes."""
    stored_counts, counts = (identity.get("samples") or {} for identity in (stored, current))
    return {
        name: f"{_DATA[name]} ({stored_counts.get(name, before)} there, {counts.get(name, now)} here)"
        for name, (before, now) in _differences(stored, current, _DATA).items()
    }


def _differences(
    stored: Mapping[str, Any], current: Mapping[str, Any], names: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """Return both values as text for each name that differs; names missing from one side are not compared."""
    pairs = {name: (stored.get(name), current.get(name)) for name in names}
    return {name: (_format(a), _format(b)) for name, (a, b) in pairs.items() if None not in (a, b) and a != b}


def _format(value: Any) -> str:
    """Format a hash by its first digits, and anything else as in YAML."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text
