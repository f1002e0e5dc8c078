"""What an adapter belongs to, and whether what a user asks for contradicts it."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import peft
from transformers import PreTrainedModel

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
# Options of PEFT that change the adapter's shape or function; the others, as the initialization, are of the past.
_OPTIONS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")
_DATA = {
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "train": "training samples",
    "val": "validation samples",
}


def hash_config(config: Any) -> str:
    """Hash what a transformers config says of the function that a model computes."""
    values = {name: getattr(config, name, None) for name in _COMPUTES}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def describe_adapter(model: peft.PeftModel) -> dict[str, Any]:
    """Return rank, alpha, dropout, targets, layers and options of an adapter as plain values.

    Targets and layers are read off the modules that carry it, however they were chosen.
    """
    config = model.peft_config[ADAPTER]
    names = [name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name]
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

    Args:
        stored: What a checkpoint or an adapter folder holds.
        own: The same of the model at hand.
        source: What it was stored in, for the message.
    """
    for name, words in (("fingerprint", "weights"), ("config_hash", "config")):
        if _differ(stored, own, name):
            raise UserError(
                f"{source} was trained on another base: {stored.get('base')} ({words} {_short(stored[name])}) there, "
                f"{own.get('base')} ({words} {_short(own[name])}) here. Name the base that it was trained on, by "
                "model.base and model.revision, or by --base where a command has that."
            )
    of_base = ["quantization"] + (["double_quant"] if own.get("quantization") in ("nf4", "fp4") else [])
    of_adapter = ["rank", "target_modules", "layers", "lora_options"]
    for names, theirs, mine in (
        (of_base, stored, own),
        (of_adapter, stored.get("adapter") or {}, own.get("adapter") or {}),
    ):
        for name in names:
            if _differ(theirs, mine, name):
                raise UserError(
                    f"{source} was trained with model.{name} {_short(theirs[name])}, but here it is "
                    f"{_short(mine[name])}. Set model.{name} to {_short(theirs[name])}, or train a new adapter."
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


def chosen_targets(model: PreTrainedModel, options: dict[str, Any]) -> list[str] | None:
    """Name the modules that the options choose; ``None`` if they choose none, and the adapter's own rule.

    Args:
        model: The base, without adapters.
        options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`.
    """
    if not {"target_modules", "layers"} & _changed(options).keys():
        return None
    return resolve_targets(model, options["target_modules"], options["layers"])


def check_adapter_options(
    model: peft.PeftModel, targets: list[str] | None, options: dict[str, Any], folder: str
) -> None:
    """Reject options that contradict the adapter that training continues with: they would be ignored.

    Args:
        model: The base with the adapter of the folder.
        targets: What :func:`chosen_targets` returned before.
        options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`; defaults contradict nothing.
        folder: The adapter folder, for the message.
    """
    changed, stored = _changed(options), describe_adapter(model)
    lora_options = changed.pop("lora_options", None) or {}
    asked = {**changed, **({} if targets is None else _summarize_targets(targets))}
    for name in changed:
        if asked[name] != stored[name]:
            raise _contradiction(name, changed[name], stored[name], folder)
    for name, value in lora_options.items():
        found = stored["lora_options"].get(name)
        if name in _OPTIONS and (value or None) != found:
            raise _contradiction(f"lora_options.{name}", value, found, folder)


def _changed(options: dict[str, Any]) -> dict[str, Any]:
    defaults = inspect.signature(add_adapters).parameters
    return {name: value for name, value in options.items() if value != defaults[name].default}


def _contradiction(name: str, asked: Any, stored: Any, folder: str) -> UserError:
    return UserError(
        f"model.{name} is {asked}, but the adapter in {folder} has {stored}, and training continues with that: "
        f"leave model.{name} out, or train a new adapter without model.adapter."
    )
