"""Choose which layers run fused: those with unmodified submodules, since a fused forward does not call them."""
# mypy: allow-untyped-calls

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bit
from torch import nn
from transformers import AttentionInterface
from transformers.activations import SiLUActivation
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_lightning.model.activation_checkpointing import enable_activation_checkpointing
from qlora_lightning.model.layers.attention import packed_attention
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, FusedNorm
from qlora_lightning.model.layers.experts import FusedExperts
from qlora_lightning.model.layers.lora import Fused, FusedInt8Linear, FusedLoRA, base_linear, compute_dtype_of
from qlora_lightning.model.layers.mixer import PackedMixer, pack_mixers
from qlora_lightning.model.model_types import EAGER_TYPES, causal_lm_of, decoder_layers, runs_packed

FUSED_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # model types whose layers compute the same as fused ones
_PACKED_ATTENTION = "qlora_packed"
_NONSTANDARD = "their parts are hooked, replaced or trained"
_OWN_ADAPTERS = "build_model returned adapters of its own (if it returns the base alone, the settings' run fused)"


class Fusion(NamedTuple):
    """Why a model's modules do not run fused, by name; ``None`` for those that do.

    Attributes:
        layers: Decoder layers. Those with a reason run as transformers wrote them.
        linears: LoRA linears. Those with a reason run as PEFT wrote them.
    """

    layers: dict[str, str | None]
    linears: dict[str, str | None]


def fuse_layers(model: nn.Module, fused: bool = True) -> Fusion:
    """Replace transformers' layers and last norm, PEFT's LoRA linears and int8 linears, and choose which run fused."""
    modeling = _modeling_of(model)
    causal_lm = causal_lm_of(model)
    layers = {*decoder_layers(causal_lm)}
    for name, module in list(model.named_modules()) if fused else []:
        if module in layers and type(module).__module__ == modeling:
            model.set_submodule(name, FusedDecoderLayer.from_layer(module))
        elif type(module) in (PeftLinear, PeftLinear4bit, PeftLinear8bit):
            model.set_submodule(name, FusedLoRA.from_layer(module))
        elif type(module) is bnb.nn.Linear8bitLt:
            model.set_submodule(name, FusedInt8Linear.from_layer(module))
        elif modeling is not None and module is causal_lm.base_model.norm and type(module).__module__ == modeling:
            model.set_submodule(name, FusedNorm.from_layer(module))
    return choose_layers(model)


def distrust(model: nn.Module) -> Fusion:
    """Put the layers of transformers and PEFT back, with their adapters, as if ``fuse_layers`` had not run."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Fused) and not isinstance(module, FusedExperts | PackedMixer):  # these have no other form
            model.set_submodule(name, module.to_layer())
    return choose_layers(model)


@contextlib.contextmanager
def library_layers(module: nn.Module) -> Iterator[None]:
    """Run a module's linears as PEFT and bitsandbytes wrote them inside this context."""
    linears = [each for each in module.modules() if isinstance(each, FusedLoRA | FusedInt8Linear)]
    reasons = [linear.fallback_reason for linear in linears]
    try:
        for linear in linears:
            linear.fallback_reason = "it is compared with the fused one"
        yield
    finally:
        for linear, reason in zip(linears, reasons, strict=True):
            linear.fallback_reason = reason


def _modeling_of(model: Any) -> str | None:
    """Return the transformers module that defines a model type's layers, if these can run fused."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"transformers.models.{model_type}.modeling_{model_type}" if model_type in FUSED_TYPES else None


def choose_layers(model: Any) -> Fusion:
    """Choose a model's attention, and which layers run fused, since their submodules may have been changed."""
    causal_lm = causal_lm_of(model)
    if (name := attention_of(causal_lm.config)) is not None:
        model.set_attn_implementation(name)  # even if something else has set another one
    if runs_packed(causal_lm.config):
        pack_mixers(causal_lm)
    _set_recompute_contexts(causal_lm)
    fusion, modeling, layers = Fusion({}, {}), _modeling_of(model), {*decoder_layers(causal_lm)}
    for name, module in model.named_modules():
        reason: str | None = None
        if isinstance(module, LoraLayer) and not isinstance(module, FusedExperts):
            reason = fusion.linears[name] = _fallback_reason_of_linear(module)
        elif module in layers:
            reason = fusion.layers[name] = _fallback_reason_of_layer(module, modeling)
        elif isinstance(module, FusedNorm) and _trains(module):
            reason = _NONSTANDARD
        if isinstance(module, Fused):
            module.fallback_reason = reason
    return fusion


class Precision(NamedTuple):
    """The dtype in which a model computes products, and where it needs autocast for that.

    Attributes:
        dtype: The dtype of the products.
        autocasts_layers: Whether layers of PEFT or transformers have float32 parameters that they do not cast.
        autocasts_whole: Whether autocast is on in transformers' own forward, which also calls embedding and head.
    """

    dtype: torch.dtype = torch.float32
    autocasts_layers: bool = False
    autocasts_whole: bool = False

    def autocast(self, device: torch.device, whole: bool) -> torch.autocast:
        """Return the context for a forward up to the last hidden states, or for a ``whole`` forward."""
        enabled = self.autocasts_whole if whole else self.autocasts_layers
        return torch.autocast(device.type, self.dtype if enabled else None, enabled=enabled)


def choose_precision(causal_lm: Any, fusion: Fusion, dtype: torch.dtype) -> Precision:
    """Choose where to turn on autocast so that a model computes in a dtype."""
    is_packed = runs_packed(causal_lm.config)
    ends = {causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()} - {None}
    cast_params = {param for module in ends for param in module.parameters()}  # packed batches cast embedding and head
    in_float32 = {
        name: param
        for name, param in causal_lm.named_parameters()
        if param.requires_grad or ".modules_to_save." in name  # of an adapter that may become active
    }
    trains_ends = not cast_params.isdisjoint(in_float32.values())
    trains_uncast = any(
        not is_packed if param in cast_params else ".lora_" not in name for name, param in in_float32.items()
    )
    autocasts_layers = dtype != torch.float32 and (trains_uncast or any(fusion.linears.values()))
    return Precision(dtype, autocasts_layers, autocasts_layers or (dtype != torch.float32 and trains_ends))


def _set_recompute_contexts(causal_lm: Any) -> None:
    """Make layers that were checkpointed by others non-reentrant, so that they recompute with their packed batch."""
    for module in causal_lm.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)  # transformers has no public getter
        if module.__dict__.get("gradient_checkpointing") and "context_fn" not in getattr(function, "keywords", {}):
            enable_activation_checkpointing(causal_lm)
            return


def attention_of(config: Any) -> str | None:
    """Return a model's ``attn_implementation``: ours for packed batches; ``None`` leaves it to transformers."""
    if runs_packed(config):
        # transformers' public extension point: the model keeps its own code and calls our function by name
        AttentionInterface.register(_PACKED_ATTENTION, packed_attention)
        AttentionMaskInterface.register(_PACKED_ATTENTION, sdpa_mask)
        return _PACKED_ATTENTION
    return "eager" if config.model_type in EAGER_TYPES else None


def _fallback_reason_of_linear(layer: Any) -> str | None:
    base, is_standard = base_linear(layer), True
    if isinstance(layer, LoraLayer):
        if layer.lora_variant or any(layer.lora_bias.values()):
            return "model.lora_options ask for more than plain LoRA"
        if any(getattr(dropout, "p", 0) for dropout in layer.lora_dropout.values()):
            return "model.dropout is not 0"
        is_standard = isinstance(layer, FusedLoRA)
    is_known = type(base) in (nn.Linear, bnb.nn.Linear4bit) or isinstance(base, FusedInt8Linear)
    is_standard = is_standard and is_known and not _trains(base)
    return None if is_standard and not any(map(has_hooks, layer.children())) else _NONSTANDARD


def _fallback_reason_of_layer(layer: Any, modeling: str | None) -> str | None:
    if not isinstance(layer, FusedDecoderLayer):
        return "layers of this family have no fused form" if modeling is None else _OWN_ADAPTERS
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    modules = {type(module).__module__ for module in (attention, mlp, *norms)}
    if modules != {modeling} or any(map(has_hooks, layer.children())) or any(map(_trains, norms)):
        return _NONSTANDARD
    if attention.attention_dropout or type(mlp.act_fn) not in (SiLUActivation, nn.SiLU):  # silu, its synonym swish
        return "the base has attention_dropout, or a hidden_act other than silu"
    linears = layer.linears()
    if reason := next(filter(None, map(_fallback_reason_of_linear, linears)), None):
        return reason
    if any(compute_dtype_of(linear) not in (layer.compute_dtype, None) for linear in linears):
        return f"the base is in {layer.compute_dtype} but computes in another dtype"
    return None


def _trains(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())


def has_hooks(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has hooks or a ``forward`` set on the instance."""
    # torch has no public getter of hooks
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in fields or any(fields[name] for name in names) for fields in map(vars, module.modules()))
