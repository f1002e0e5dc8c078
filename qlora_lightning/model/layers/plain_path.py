"""Tells a user which layers do not run fused, why, and what would change that."""

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.layers.decoder_layer import ACTIVATIONS, FusedDecoderLayer


def runs_fused(layer: nn.Module) -> bool:
    """Whether a decoder layer runs fused on flat batches, outside of autocast."""
    return isinstance(layer, FusedDecoderLayer) and layer.is_usual()


def explain_plain_layers(model: Any, *, autocasts: bool, precision: str) -> str | None:
    """Say why decoder layers take the plain path of PEFT and transformers in training, and what to do about it.

    Args:
        model: transformers' causal language model with its adapters, in training mode.
        autocasts: Whether the module computes under autocast, as something beside plain LoRA trains.
        precision: Lightning's name, as ``32-true``.

    Returns:
        A sentence; ``None`` where all layers run fused.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    mixed = precision.endswith("-mixed")
    plain = layers if autocasts or mixed else [layer for layer in layers if not runs_fused(layer)]
    if not plain:
        return None
    reasons = [*_of_adapters(model), *_of_base(plain[0], model.config)]
    if autocasts:
        reasons += _of_what_trains_beside(model)
    if mixed:
        reasons.append(f"trainer.precision is {precision} (32-true computes products in model.compute_dtype anyway)")
    if not reasons and not any(isinstance(layer, FusedDecoderLayer) for layer in layers):
        reasons.append("build_model put them together itself (those of QLoRAModule.build_model run fused)")
    if not reasons:
        reasons.append("their parts have hooks, or are not plain LoRA on frozen linears of transformers' LLaMA")
    count = f"All {len(layers)}" if len(plain) == len(layers) else f"{len(plain)} of {len(layers)}"
    return f"{count} layers train by the slower layers of PEFT and transformers: {'; '.join(reasons)}."


def _of_adapters(model: nn.Module) -> Iterator[str]:
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    dropouts = [
        dropout.p for each in adapted for dropout in each.lora_dropout.values() if isinstance(dropout, nn.Dropout)
    ]
    if any(dropouts):
        yield f"the adapters drop inputs with probability {max(dropouts):g} (model.dropout: 0 would run fused)"
    kinds = {type(variant).__name__ for each in adapted for variant in each.lora_variant.values()}
    if any(kind.startswith("Dora") for kind in kinds):
        yield "the adapters are DoRA (plain LoRA, without use_dora in model.lora_options, would run fused)"
    others = sorted(kind for kind in kinds if not kind.startswith("Dora"))
    if others:
        yield f"the adapters are of PEFT's {', '.join(others)} (plain LoRA would run fused)"
    if any(any(each.lora_bias.values()) for each in adapted):
        yield "the adapters train biases (lora_bias: false would run fused)"
    if any(isinstance(each.get_base_layer(), bnb.nn.Linear8bitLt) for each in adapted):
        yield "the base is stored in int8 (model.quantization: nf4 would run fused)"


def _of_base(layer: Any, config: Any) -> Iterator[str]:
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        yield f"the base's config.json has attention_dropout {dropout:g} (0 there would run fused)"
    activation = getattr(getattr(layer, "mlp", None), "act_fn", None)
    if activation is not None and type(activation) not in ACTIVATIONS:
        yield f"the base's hidden_act is {getattr(config, 'hidden_act', '?')} (only silu is fused: leave it so)"


def _of_what_trains_beside(model: nn.Module) -> Iterator[str]:
    beside = [name for name in trainable_tensors(model) if ".lora_" not in name]
    if beside:
        yield (
            f"{len(beside)} tensors train beside the adapters, as {beside[0]} (without modules_to_save and "
            "trainable_token_indices in model.lora_options the layers would run fused)"
        )
