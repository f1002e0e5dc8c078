"""Which layers run fused: made so when a model is put together, chosen when training or evaluation starts.

A fused forward does the work of parts that it does not call. So it is chosen only where these parts are as the
libraries made them, nobody watches them, and they compute what the fused functions do.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers.activations import SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.layers.attention import FLAT_ATTENTION
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer
from qlora_lightning.model.layers.lora import FusedLinear, FusedLinear4bit, compute_dtype_of, runs_fused

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class Originals:
    """Functions of libraries, as they were when this was made: before or after, others may put theirs there.

    Libraries of kernels do so, for all models at once.
    """

    def __init__(self, *places: tuple[Any, str]) -> None:
        """Look at them.

        Args:
            places: Of each function the class or module that holds it, and its name there.
        """
        self._found = [(vars(owner), name, getattr(owner, name)) for owner, name in places]
        self._are_own = all(_is_own(function) for _, _, function in self._found)

    def are_there(self) -> bool:
        """Whether each is the library's own."""
        # in a loop: every layer asks in every pass
        for names, name, function in self._found:
            if names.get(name) is not function:
                return False
        return self._are_own


def _is_own(function: Any) -> bool:
    folders = tuple(os.path.join(os.path.dirname(str(sys.modules[each].__file__)), "") for each in _LIBRARIES)
    return all(file.startswith(folders) for file in _files(function))


def _files(function: Any) -> Iterator[str]:
    """Give where a function is written, and each that it wraps: ``functools.wraps`` copies all names but not that."""
    while function is not None:
        yield getattr(getattr(function, "__code__", None), "co_filename", "")
        function = getattr(function, "__wrapped__", None)


# torch has no public way to ask
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def is_watched(module: nn.Module) -> bool:
    """Whether the module, or one inside it, has hooks or a forward of its own, or all modules have hooks."""
    inside: list[nn.Module | None] = [module]
    for each in inside:  # grows on the way: every layer asks in every pass, and modules() takes four times as long
        if each is not None:
            own = each.__dict__  # quicker than to ask the module
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return True
            inside += own["_modules"].values()
    return any(getattr(global_hooks, kind) for kind in _GLOBAL)


ORIGINAL_LINEARS = Originals(
    *((kind, "forward") for kind in (nn.Linear, bnb.nn.Linear4bit, nn.Identity, nn.Dropout, PeftLinear, PeftLinear4bit))
)
_PARTS = (LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRMSNorm)
ACTIVATIONS = (SiLUActivation, nn.SiLU)  # of hidden_act silu, and of swish, which is the same function
_ORIGINALS = Originals(
    *((kind, "forward") for kind in (LlamaDecoderLayer, *_PARTS[:3], *ACTIVATIONS)),
    (llama, "apply_rotary_pos_emb"),
    (llama, "rotate_half"),
    (F, "silu"),
)


def fuse_layers(model: nn.Module) -> list[str]:
    """Let the LoRA linears and the decoder layers of a PEFT model that can be fused run so.

    PEFT and transformers have made them; only their classes, and so their ``forward``, change.

    Returns:
        The names of the LoRA layers that keep PEFT's forward: int8, dropout, DoRA and other variants.
    """
    left = fuse_lora_linears(model)
    for layer in model.modules():
        if type(layer) is LlamaDecoderLayer and _has_usual_parts(layer):
            layer.__class__ = FusedDecoderLayer
    choose_layers(model)
    return left


def choose_layers(model: nn.Module) -> None:
    """Choose for each layer whether it runs fused in the mode that it is in, training or evaluation.

    To be called when either starts, behind whoever may change or watch parts of the model.
    """
    for layer in model.modules():
        if isinstance(layer, FusedLinear | FusedLinear4bit):
            fuses = is_plain(layer) and ORIGINAL_LINEARS.are_there() and not any(map(is_watched, layer.children()))
        elif isinstance(layer, FusedDecoderLayer):
            dtypes = {compute_dtype_of(each) for each in _linears_of(layer)}
            fuses = len(dtypes) == 1 and _is_usual(layer)
            layer.__dict__["_dtype"] = next(iter(dtypes))
        else:
            layer.__dict__.pop("_runs_fused", None)
            continue
        layer.__dict__.setdefault("_runs_fused", {})[layer.training] = fuses


def _is_usual(layer: Any) -> bool:
    """Whether a layer computes what its fused forward does, and nobody watches parts that this skips."""
    attention = layer.self_attn
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return bool(
        _has_usual_parts(layer)
        and not (attention.training and attention.attention_dropout)
        and attention.config._attn_implementation == FLAT_ATTENTION
        and all(map(is_plain, _linears_of(layer)))
        and not any(norm.weight.requires_grad for norm in norms)
        and not any(map(is_watched, layer.children()))
        and ORIGINAL_LINEARS.are_there()
    )


def _linears_of(layer: Any) -> Iterator[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _has_usual_parts(layer: Any) -> bool:
    parts = (layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
    return tuple(map(type, parts)) == _PARTS and type(layer.mlp.act_fn) in ACTIVATIONS and _ORIGINALS.are_there()


def is_plain(layer: Any) -> bool:
    """Whether a linear is frozen and has at most one active, unmerged adapter without dropout, bias or variant."""
    if type(layer) not in (FusedLinear4bit, FusedLinear):
        return _is_frozen(layer)
    if "forward" in vars(layer) or len(layer.active_adapters) != 1 or layer.merged or not _is_frozen(layer.base_layer):
        return False
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A:  # it leaves this linear as it is
        return True
    matrices = layer.lora_A[adapter], layer.lora_B[adapter]
    if any(type(each) is not nn.Linear or each.bias is not None for each in matrices):
        return False
    dropout = layer.lora_dropout[adapter]
    return (
        adapter not in layer.lora_variant
        and not layer.lora_bias[adapter]
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
    )


def _is_frozen(linear: Any) -> bool:
    if type(linear) not in (nn.Linear, bnb.nn.Linear4bit) or "forward" in vars(linear):
        return False
    if type(linear) is bnb.nn.Linear4bit and not isinstance(linear.weight, bnb.nn.Params4bit):
        return False  # of a model that was pickled: bitsandbytes' own forward makes it whole again
    return not (linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad))


def fuse_lora_linears(model: nn.Module) -> list[str]:
    """Let every LoRA linear of a PEFT model that can be fused use :class:`LoRALinearFunction`.

    PEFT has made the layers; only their class, and so their ``forward``, changes.

    Returns:
        The names of the LoRA layers that keep PEFT's forward: int8, dropout, DoRA and other variants.
    """
    fused = {PeftLinear4bit: FusedLinear4bit, PeftLinear: FusedLinear}
    fused |= {kind: kind for kind in fused.values()}  # of an adapter before
    left: list[str] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) in fused and _can_be_plain(layer):
            layer.__class__ = fused[type(layer)]
        else:
            left.append(name)
    return left


def _can_be_plain(layer: LoraLayer) -> bool:
    return (
        type(layer.get_base_layer()) in (nn.Linear, bnb.nn.Linear4bit)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(type(dropout) is nn.Identity for dropout in layer.lora_dropout.values())
    )


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
