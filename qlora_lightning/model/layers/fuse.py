"""Which layers run fused: made so when a model is put together, chosen again when what that rests on has changed.

A fused forward does the work of parts that it does not call. So it is chosen only where these parts are as the
libraries made them, nobody watches them, and they compute what the fused functions do.
"""
# mypy: allow-untyped-calls

import functools
import sys
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.activations import SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.layers.attention import FLAT_ATTENTION
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, fused_class
from qlora_lightning.model.layers.lora import (
    FusedLinear,
    FusedLinear4bit,
    compute_dtype_of,
    has_hooks,
    is_plain_lora,
    runs_fused,
)

FUSED_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # model types whose layers compute what fused ones do
_ACTIVATIONS = (SiLUActivation, nn.SiLU)  # of hidden_act silu, and of swish, which is the same function
_LINEARS = (nn.Linear, bnb.nn.Linear4bit, nn.Identity, nn.Dropout, PeftLinear, PeftLinear4bit)
_FUSED = {
    **{PeftLinear4bit: FusedLinear4bit, PeftLinear: FusedLinear},
    **{FusedLinear4bit: FusedLinear4bit, FusedLinear: FusedLinear},  # of an adapter before
}
_LIBRARIES = ("torch.", "transformers.", "peft.", "bitsandbytes.")


@functools.cache
def _originals(model_type: str) -> dict[tuple[Any, str], Any]:
    """Return what fused functions compute themselves: who replaces it, for all models at once, wants it called."""
    owners: list[tuple[Any, str]] = [(kind, "forward") for kind in (*_LINEARS, *_ACTIVATIONS)] + [(F, "silu")]
    modeling = _modeling(model_type)
    if modeling is not None:
        parts = ("DecoderLayer", "Attention", "MLP", "RMSNorm")
        kinds = [kind for name, kind in vars(modeling).items() if name.endswith(parts) and isinstance(kind, type)]
        owners += [(kind, "forward") for kind in kinds if kind.__module__ == modeling.__name__]
        owners += [(modeling, "apply_rotary_pos_emb"), (modeling, "rotate_half")]
    return {(owner, name): getattr(owner, name) for owner, name in owners}


def _modeling(model_type: str) -> ModuleType | None:
    """Return the module of transformers that has a family's layers, if these can run fused."""
    name = f"transformers.models.{model_type}.modeling_{model_type}"
    return sys.modules.get(name) if model_type in FUSED_TYPES else None


def libraries_are_original(model_type: str = "") -> bool:
    """Whether nobody has replaced a function that ours stand for, as libraries of kernels do."""
    return all(
        getattr(owner, name, None) is function and str(getattr(function, "__module__", "")).startswith(_LIBRARIES)
        for (owner, name), function in _originals(model_type).items()
    )


def is_watched(module: nn.Module) -> bool:
    """Whether the module, or one inside it, has hooks or a forward of its own, or all modules have hooks."""
    return bool(torch_module._has_any_global_hook()) or any(map(has_hooks, module.modules()))


def fuse_layers(model: nn.Module) -> list[str]:
    """Let the LoRA linears and the decoder layers of a PEFT model that can be fused run so.

    PEFT and transformers have made them; only their classes, and so their ``forward``, change.

    Returns:
        The names of the LoRA layers that keep PEFT's forward: int8, dropout, DoRA and other variants.
    """
    left, modeling = [], _modeling(_type_of(model))
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            if _is_fusable_kind(layer):
                layer.__class__ = _FUSED[type(layer)]
            else:
                left.append(name)
        elif isinstance(layer, GradientCheckpointingLayer) and sys.modules.get(type(layer).__module__) is modeling:
            kind: Any = type(layer)
            layer.__class__ = fused_class(kind)
    choose_layers(model)
    return left


def _type_of(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _is_fusable_kind(layer: LoraLayer) -> bool:
    return (
        type(layer) in _FUSED
        and type(layer.get_base_layer()) in (nn.Linear, bnb.nn.Linear4bit)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(type(dropout) is nn.Identity for dropout in layer.lora_dropout.values())
    )


def choose_layers(model: nn.Module) -> None:
    """Choose for each layer whether it runs fused in its mode, if what this rests on has changed since the last choice.

    To be called before each run of the model: anyone may change or watch its parts between two.
    """
    reasons = _reasons(model)
    if model.__dict__.get("_chosen_by") == reasons:
        return
    model.__dict__["_chosen_by"] = reasons
    for layer in model.modules():
        if isinstance(layer, FusedLinear | FusedLinear4bit):
            fuses = reasons[0] and is_plain_lora(layer)
        elif isinstance(layer, FusedDecoderLayer):
            fuses = reasons[0] and _is_usual(layer)
            if fuses:
                layer.__dict__["_dtype"] = compute_dtype_of(layer.self_attn.q_proj)
        else:
            layer.__dict__.pop("_runs_fused", None)
            continue
        layer.__dict__.setdefault("_runs_fused", {})[layer.training] = fuses


def _reasons(model: Any) -> list[Any]:
    """Return what the choice rests on and others may change: first, whether any layer may run fused.

    It is asked for in every micro-batch: of SmolLM2's 2,499 modules 2 ms, where a choice takes 18.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", FLAT_ATTENTION)
    is_original = libraries_are_original(_type_of(model)) and not torch_module._has_any_global_hook()
    fast = attention == FLAT_ATTENTION and is_original
    found: list[Any] = [fast]
    left = [model]
    while left:
        module = left.pop()
        own = module.__dict__
        found += type(module), own["training"], has_hooks(module), own.get("attention_dropout")
        if "lora_variant" in own:
            found += *module.active_adapters, module.merged, *module.lora_variant
        if own["_parameters"]:
            found.append(own.get("compute_dtype"))
            for tensor in own["_parameters"].values():
                asks = tensor is not None and type(tensor) is not bnb.nn.Params4bit  # packed it cannot train
                found += (tensor.requires_grad, tensor.dtype) if asks else (type(tensor),)
        left += [each for each in own["_modules"].values() if each is not None]
    return found


def _is_usual(layer: Any) -> bool:
    """Whether a layer computes what its fused forward does, and nobody watches parts that this skips."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    kinds = {type(attention), type(mlp), *map(type, norms)}
    if kinds != set(layer.parts) or getattr(mlp, "act_fn", None).__class__ not in _ACTIVATIONS:
        return False
    of_attention = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    linears = *of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    return bool(
        not (attention.training and attention.attention_dropout)
        and all(map(is_plain_lora, linears))
        and len(set(map(compute_dtype_of, linears))) == 1
        and not any(norm.weight.requires_grad for norm in norms)
        and not any(map(is_watched, layer.children()))
    )


def explain_plain_layers(model: Any, *, autocasts: bool, precision: str) -> str | None:
    """Report why decoder layers take the plain path of PEFT and transformers in training.

    Args:
        model: transformers' causal language model with its adapters, in training mode.
        autocasts: Whether the module computes under autocast, as something beside plain LoRA trains.
        precision: Lightning's name, as ``32-true``.

    Returns:
        A sentence; ``None`` if all layers run fused.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    mixed = precision.endswith("-mixed")
    plain = layers if autocasts or mixed else [layer for layer in layers if not runs_fused(layer)]
    if not plain:
        return None
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    variants = {type(variant).__name__ for each in adapted for variant in each.lora_variant.values()}
    beside = [name for name in trainable_tensors(model) if ".lora_" not in name]
    attention_dropout = getattr(model.config, "attention_dropout", 0)
    activation = getattr(getattr(plain[0], "mlp", None), "act_fn", None)
    family = _type_of(model)
    reasons = {
        f"layers of the type {family} have no fused form": family not in FUSED_TYPES,
        "model.dropout is not 0": any(getattr(p, "p", 0) for each in adapted for p in each.lora_dropout.values()),
        f"model.lora_options ask for PEFT's {', '.join(sorted(variants))}": variants,
        "model.lora_options train biases": any(any(each.lora_bias.values()) for each in adapted),
        "model.quantization is int8": any(isinstance(each.get_base_layer(), bnb.nn.Linear8bitLt) for each in adapted),
        f"model.lora_options train {', '.join(beside[:1])} beside the adapters": beside,
        f"the base's attention_dropout is {attention_dropout:g}": attention_dropout,
        f"the base's hidden_act is {getattr(model.config, 'hidden_act', '?')}, not silu": (
            family in FUSED_TYPES and activation is not None and type(activation) not in _ACTIVATIONS
        ),
        f"trainer.precision is {precision} (32-true computes products in model.compute_dtype anyway)": mixed,
    }
    found = [reason for reason, holds in reasons.items() if holds] or ["their parts are hooked, replaced or no LLaMA's"]
    count = f"All {len(layers)}" if len(plain) == len(layers) else f"{len(plain)} of {len(layers)}"
    return f"{count} layers train by the slower layers of PEFT and transformers: {'; '.join(found)}."
