"""What an adapter belongs to, and whether what a user asks for contradicts it."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import peft
from transformers import PreTrainedModel

from qlora_lightning.model.adapters.lora import add_adapters
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
    """Give rank, alpha, dropout, targets, layers and options of an adapter as plain values.

    Targets and layers are read off the modules that carry it, however they were chosen.
    """
    config = model.peft_config["default"]
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    layers = {int(match[1]) for name in adapted if (match := re.search(r"\.layers\.(\d+)\.", name))}
    options = {
        "use_rslora": bool(config.use_rslora),
        "use_dora": bool(config.use_dora),
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
        "modules_to_save": sorted(config.modules_to_save or []),
        "trainable_token_indices": config.trainable_token_indices,
    }
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "layers": sorted(layers),
        "lora_options": {name: value for name, value in options.items() if value},
    }


def identity_of_data(trainer: Any) -> dict[str, Any]:
    """Give what the trainer's data module says of its rows, tokenizer and template; nothing where it says nothing."""
    identity = getattr(getattr(trainer, "datamodule", None), "identity", None)
    return dict(identity) if isinstance(identity, Mapping) else {}


def check_identity(stored: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter of another base or another shape: it would load without a word and answer nonsense.

    What one of the two does not know is not compared.

    Args:
        stored: What a checkpoint or an adapter folder carries.
        own: The same of the model at hand.
        source: What it was stored in, for the message.

    Raises:
        UserError: Base, quantization or the adapter's shape differ.
    """
    for name, words in (("fingerprint", "weights"), ("config_hash", "config")):
        if _differ(stored, own, name):
            raise UserError(
                f"{source} was trained on another base: {stored.get('base')} ({words} {_short(stored[name])}) there, "
                f"{own.get('base')} ({words} {_short(own[name])}) here. Name the base that it was trained on, by "
                "model.base and model.revision, or by --base where a command has that."
            )
    _check_quantization(stored, own, source)
    theirs, mine = stored.get("adapter") or {}, own.get("adapter") or {}
    for name in ("rank", "target_modules", "layers", "lora_options"):
        if _differ(theirs, mine, name):
            raise UserError(
                f"{source} holds an adapter with model.{name} {_short(theirs[name])}, this model's has "
                f"{_short(mine[name])}. Set model.{name} to what it was trained with, or train a new adapter."
            )


def data_differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """Give what differs between two identities of data, by name, each in words that show both sides."""
    return {
        name: f"{words} ({_show_both(stored, own, name)})"
        for name, words in _DATA.items()
        if _differ(stored, own, name)
    }


def _show_both(stored: Mapping[str, Any], own: Mapping[str, Any], name: str) -> str:
    """Show the numbers of samples, where both sides know them; else the hashes."""
    then, now = (each.get("samples", {}).get(name) for each in (stored, own))
    if then is None or now is None:
        return f"{_short(stored[name])} there, {_short(own[name])} here"
    return (
        f"{now:,} there and here, not the same or in another order" if then == now else f"{then:,} there, {now:,} here"
    )


def _check_quantization(stored: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    names = ["quantization"]
    if own.get("quantization") in ("nf4", "fp4"):
        names.append("double_quant")
    for name in names:
        if _differ(stored, own, name):
            raise UserError(
                f"{source} was trained on its base with model.{name} {_short(stored[name])}, but here it is "
                f"{_short(own[name])}. Set model.{name} to {_short(stored[name])}."
            )


def _differ(stored: Mapping[str, Any], own: Mapping[str, Any], name: str) -> bool:
    return stored.get(name) is not None and own.get(name) is not None and stored[name] != own[name]


def _short(value: Any) -> str:
    """A hash by its first digits, anything else as YAML would have it."""
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(r"[0-9a-f]{40,}", text):
        return text[:12]
    return text if len(text) <= 80 else f"{text[:77]}…"


_OPTIONS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")


def chosen_targets(model: PreTrainedModel, options: dict[str, Any]) -> list[str] | None:
    """Name the modules that the options choose; ``None`` where they choose none, and the adapter's own rule.

    Args:
        model: The base, without adapters.
        options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`.
    """
    chosen = _changed(options)
    if not {"target_modules", "layers"} & chosen.keys():
        return None
    return resolve_targets(model, options["target_modules"], options["layers"])


def check_adapter_options(
    model: peft.PeftModel, targets: list[str] | None, options: dict[str, Any], folder: str
) -> None:
    """Refuse options that contradict the adapter that training goes on with: they would be ignored.

    Args:
        model: The base with the adapter of the folder.
        targets: What :func:`chosen_targets` gave before.
        options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`; defaults contradict nothing.
        folder: The adapter folder, for the message.

    Raises:
        UserError: An option asks for something else.
    """
    stored, chosen = describe_adapter(model), _changed(options)
    for name in ("rank", "alpha", "dropout"):
        if name in chosen and chosen[name] != stored[name]:
            raise _contradiction(name, chosen[name], stored[name], folder)
    if targets is not None:
        _check_targets(model, targets, chosen, stored, folder)
    for name, value in (chosen.get("lora_options") or {}).items():
        found = stored["lora_options"].get(name)
        if name in _OPTIONS and (value or None) != found:  # the others, as the initialization, are of the past
            raise _contradiction(f"lora_options.{name}", value, found, folder)


def _check_targets(
    model: peft.PeftModel, targets: list[str], chosen: dict[str, Any], stored: dict[str, Any], folder: str
) -> None:
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    layers = {layer_of(name) for name in adapted}
    if "layers" in chosen and layers != {layer_of(name) for name in targets}:
        raise _contradiction("layers", chosen["layers"], stored["layers"], folder)
    if "target_modules" in chosen and adapted != {name for name in targets if layer_of(name) in layers}:
        raise _contradiction("target_modules", chosen["target_modules"], stored["target_modules"], folder)


def _changed(options: dict[str, Any]) -> dict[str, Any]:
    defaults = inspect.signature(add_adapters).parameters
    return {name: value for name, value in options.items() if value != defaults[name].default}


def _contradiction(name: str, asked: Any, stored: Any, folder: str) -> UserError:
    return UserError(
        f"model.{name} is {asked}, but the adapter in {folder} has {stored}, and training goes on with that: "
        f"leave model.{name} out, or train a new adapter without model.adapter."
    )
