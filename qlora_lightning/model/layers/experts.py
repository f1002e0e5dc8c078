"""Mixture-of-experts weights in 4 bits: packed while a base is loaded, and dequantized one expert at a time.

transformers marks a type's experts with ``use_experts_implementation`` and lets a registered function compute them.
Our function sorts tokens by expert, then multiplies each expert's tokens by its weights. It is one autograd function,
so no dense weight outlives its product, and backward dequantizes again. Experts see tokens, not rows.
"""
# mypy: allow-untyped-calls, allow-subclassing-any

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType, NoneType
from typing import Any, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit, quantize_blockwise
from peft.tuners.lora import LoraConfig, ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.mxfp4 import Mxfp4Dequantize, convert_moe_packed_tensors
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_lightning.model.layers.lora import Fused, active_lora, dequantize, device_of_autocast, master_gradient
from qlora_lightning.model.model_types import decoder_layers
from qlora_lightning.support.errors import UserError

# Earlier versions of PEFT laid out A and B of experts in another way, which later versions cannot read. With
# transformers 5.17 they cannot open any.
ADAPTS_EXPERTS = tuple(map(int, version("peft").split(".")[:2])) >= (0, 20)

# The name of our experts function in transformers' registry, and the quant_method in a cached base's config.json.
_NAME = "qlora_lightning_experts"
_BLOCKSIZE, _NESTED_BLOCKSIZE = 64, 256  # of bitsandbytes: weights per scale, and scales per nested scale


def experts_of(model: nn.Module) -> dict[str, Any]:
    """Return the experts modules that this package computes, by name: those with transformers' experts interface."""
    return {name: module for name, module in model.named_modules() if _is_computed(module)}


def _is_computed(experts: Any) -> bool:
    if not all(hasattr(experts, mark) for mark in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return False
    weights = (getattr(experts, name, None) for name in weight_names(experts))
    plain = [weight for weight in weights if not isinstance(weight, bnb.nn.Params4bit | NoneType)]  # others are packed
    is_aligned = all(weight[0].numel() % _BLOCKSIZE == 0 for weight in plain)  # no block spans two experts
    return is_aligned and not getattr(experts, "has_post_expert_norm", False)


def weight_names(experts: Any) -> tuple[str, str]:
    """Return the names of an experts module's two weights; each holds all experts."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


# ---- packed weights --------------------------------------------------------------------------------------------------


class PackedExperts(bnb.nn.Linear4bit):
    """A 4-bit weight ``(n_experts, rows, columns)``, saved, sharded and counted like a bitsandbytes linear.

    It is never called, because :class:`ExpertsFunction` multiplies by one expert at a time.
    """

    def __init__(self, shape: Sequence[int], config: BitsAndBytesConfig) -> None:
        n_experts, rows, columns = shape
        options = {"compute_dtype": config.bnb_4bit_compute_dtype, "quant_type": config.bnb_4bit_quant_type}
        options["compress_statistics"] = config.bnb_4bit_use_double_quant
        super().__init__(columns, n_experts * rows, bias=False, **options, device="meta")
        self.shape = tuple(shape)


def packed_name(name: str) -> str:
    """Return the name of a packed weight, which no pattern in transformers' conversions matches."""
    return f"packed_{name}"


def pack(weight: Tensor, quant_type: str, double_quant: bool) -> bnb.nn.Params4bit:
    """Quantize ``(n_experts, rows, columns)`` one expert at a time, with bitsandbytes' result for all at once."""
    experts = [weight] if weight.is_meta else weight
    parts = [quantize_4bit(expert.contiguous(), blocksize=_BLOCKSIZE, quant_type=quant_type) for expert in experts]
    packed, state = torch.cat([packed for packed, _ in parts]), parts[0][1]
    state.absmax, state.shape = torch.cat([state.absmax for _, state in parts]), weight.shape
    if double_quant:
        state.offset, state.nested = state.absmax.mean(), True
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=_NESTED_BLOCKSIZE)
    options = {"quant_type": quant_type, "compress_statistics": double_quant, "blocksize": _BLOCKSIZE}
    return bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True, **options)


def pack_experts(model: Any, config: BitsAndBytesConfig, fill: bool = True) -> None:
    """Replace all experts' weights with packed ones; without ``fill``, they are left empty, to be loaded later."""
    all_experts = experts_of(model).values()
    if all_experts:
        register_experts()
        model.set_experts_implementation(_NAME)
    for experts in all_experts:
        for name in weight_names(experts):
            weight = getattr(experts, name)
            if fill and not isinstance(weight, bnb.nn.Params4bit):
                weight = pack(weight.detach(), config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
            module = PackedExperts(weight.quant_state.shape if fill else weight.shape, config)
            if fill:
                module.weight = weight
            delattr(experts, name)
            setattr(experts, packed_name(name), module.requires_grad_(False))
        experts._is_hf_initialized = True  # else transformers' initialization would look for the weights


# ---- loading ---------------------------------------------------------------------------------------------------------


class ExpertsConfig(BitsAndBytesConfig):
    """bitsandbytes' 4-bit settings, for a model whose experts are packed too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "load_in_4bit": True})
        self.quant_method = _NAME

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, without those that make transformers choose its own quantizer."""
        return {name: value for name, value in super().to_dict().items() if "load_in" not in name}


class _PackWhileLoading(Bnb4bitQuantize):
    """Pack experts' weights; leave everything else to bitsandbytes."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """Convert weights that transformers has joined or split from the tensors in the files."""
        config = self.hf_quantizer.quantization_config
        converted: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if (described := model.get_parameter(name)).dim() == 3:
                weight = value[0] if isinstance(value, list) else value
                if weight.shape != described.shape:  # transformers does not check the shapes of weights it quantizes
                    raise UserError(f"{name} has the shape {[*weight.shape]}, not {[*described.shape]}", "base.tensors")
                converted[name] = pack(weight, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
            else:
                converted |= super().convert({name: value}, model=model, **kwargs)
        return converted


class _Mxfp4(Mxfp4Dequantize):
    """Dequantize a published gpt-oss weight one expert at a time; 16 bits hold its values exactly."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Convert the blocks and scales of one weight."""
        dtype = self.hf_quantizer.quantization_config.bnb_4bit_compute_dtype
        blocks, scales = (input_dict[pattern][0].split(1) for pattern in source_patterns)
        experts = [convert_moe_packed_tensors(*pair, dtype=dtype) for pair in zip(blocks, scales, strict=True)]
        return {target_patterns[0]: torch.cat(experts)}


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantizer, extended to pack experts; only one weight of one layer is in 16 bits at a time."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        if _is_computed(experts := model.get_submodule(module)):
            return name in weight_names(experts)
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> ConversionOps:
        return _PackWhileLoading(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return transformers' conversions, plus one for MXFP4 that leaves no 16-bit weights in memory."""
        names = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
        mxfp4 = [WeightConverter([f"{name}_blocks", f"{name}_scales"], name, [_Mxfp4(self)]) for name in names]
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return mxfp4 + conversions

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        if self.pre_quantized:
            pack_experts(model, self.quantization_config, fill=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            pack_experts(model, self.quantization_config)
        return super()._process_model_after_weight_loading(model, **kwargs)


@functools.cache
def register_experts() -> None:
    """Register our quantizer and our experts function with transformers."""
    register_quantization_config(_NAME)(ExpertsConfig)
    register_quantizer(_NAME)(ExpertsQuantizer)
    ALL_EXPERTS_FUNCTIONS.register(_NAME, run_experts)


def check_experts(causal_lm: Any, quantization: str, name: str) -> None:
    """Reject a mixture of experts that cannot be packed, or not with the requested quantization."""
    model_type, all_experts = causal_lm.config.model_type, experts_of(causal_lm).values()
    if all_experts and quantization == "int8":
        raise UserError(
            f"Base {name}: experts of a {model_type} can be quantized to 4 bits only. Set model.quantization to nf4.",
            "model.quantization",
        )
    top_k = getattr(causal_lm.config, "num_experts_per_tok", 1)
    if any(top_k not in range(1, experts.num_experts + 1) for experts in all_experts):
        raise UserError(
            f"Base {name}: num_experts_per_tok in its config.json is {top_k}, expected a number from 1 to the number "
            "of experts.",
            "num_experts_per_tok",
        )
    packed = {getattr(experts, weight) for experts in all_experts for weight in weight_names(experts)}
    weights = {parameter for layer in decoder_layers(causal_lm) for parameter in layer.parameters()}
    unpacked_size = sum(weight.numel() for weight in weights - packed if weight.dim() == 3)
    share = unpacked_size / max(1, sum(weight.numel() for weight in weights))
    if share > 0.1:
        raise UserError(
            f"Base {name}: {share:.0%} of the layers' weights of a {model_type} are fused experts in a layout that "
            "cannot be packed. Set model.quantization to none to keep them in 16 bits, or choose another base.",
            "base.experts",
        )


# ---- routing ---------------------------------------------------------------------------------------------------------


def routers_of(model: nn.Module) -> set[nn.Module]:
    """Return the linears that choose experts, which no preset adapts; in many types, the router is not a linear."""
    modules = (named for layer in decoder_layers(model) for named in layer.named_modules())
    routers = {"gate", "router"}
    return {module for name, module in modules if isinstance(module, nn.Linear) and routers & {*name.split(".")}}


def experts_per_token(config: Any) -> int:
    """Return the maximum number of experts per token."""
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    count = next((count for name in names if (count := getattr(config, name, None)) is not None), 1)
    return max(count) if isinstance(count, list) else int(count)


Slices = Mapping[int, slice]  # for each expert with tokens, its (token, expert) pairs in the order sorted by expert


def sort_by_expert(top_k_index: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Slices]:
    """Sort (token, expert) pairs on the device; the host reads the bounds once, for the loop over experts.

    Returns:
        The position of each sorted pair in ``(n_tokens, top_k)``, the inverse of that order, and the slices.
    """
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    bounds = torch.searchsorted(flat[order], torch.arange(n_experts + 1, device=flat.device)).tolist()
    assert bounds[-1] == len(flat), "each index names an expert"
    slices = {expert: slice(*pairs) for expert, pairs in enumerate(itertools.pairwise(bounds)) if pairs[0] < pairs[1]}
    return order, order.argsort(), slices


# ---- the products ----------------------------------------------------------------------------------------------------


class ExpertWeights:
    """The frozen weights of all experts in one of their two products, with their adapters.

    Args:
        experts: The experts module.
        name: The weight's name.
        dtype: The dtype of the products.
        scaling: Factor on the adapters' part.
        lora_A: A of all experts as PEFT stores it, ``(n_experts · rank, in)``; ``None`` without adapters.
        lora_B: B of all experts as PEFT stores it, ``(out, rank · n_experts)``; along the columns, the expert index
            varies fastest.
    """

    def __init__(
        self, experts: Any, name: str, dtype: torch.dtype, scaling: float, lora_A: Tensor | None, lora_B: Tensor | None
    ) -> None:
        self._experts, self._name, self._dtype, self.scaling = experts, name, dtype, scaling
        self.bias = getattr(experts, f"{name}_bias").to(dtype) if experts.has_bias else None  # (n_experts, out)
        self._packed: Any = getattr(experts, packed_name(name), None)
        n_experts, *sizes = (getattr(experts, name) if self._packed is None else self._packed).shape
        self.in_features, self.out_features = sizes if experts.is_transposed else sizes[::-1]
        self.adapters, self.lora_A, self.lora_B = (lora_A, lora_B), None, None  # the adapters are trained
        if lora_A is not None and lora_B is not None:
            self.lora_A = lora_A.detach().to(dtype).view(n_experts, -1, self.in_features)  # (n_experts, rank, in)
            lora_B = lora_B.detach().to(dtype).view(self.out_features, -1, n_experts)
            self.lora_B = lora_B.permute(2, 0, 1).contiguous()  # (n_experts, out, rank)

    def _dense(self, slices: Slices) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield each expert that has tokens, its pairs, and its weight ``(in, out)``."""
        if self._packed is not None:
            packed, state = self._packed.weight.data, self._packed.weight.quant_state
            absmax, options = state.absmax, {"blocksize": state.blocksize, "quant_type": state.quant_type}
            if state.nested:  # for all experts at once, because blocks of scales span experts
                absmax = dequantize_blockwise(absmax, state.state2) + state.offset
            options |= {"shape": torch.Size(state.shape[1:]), "code": state.code, "dtype": state.dtype}
            stacked, absmax = (tensor.view(state.shape[0], -1) for tensor in (packed, absmax))
        for expert, pairs in slices.items():
            if self._packed is None:
                weight = getattr(self._experts, self._name)[expert]
            else:
                weight = dequantize(stacked[expert], QuantState(absmax[expert], **options))
            weight = weight.to(self._dtype)
            yield expert, pairs, weight if self._experts.is_transposed else weight.t()

    def multiply(self, x: Tensor, slices: Slices) -> Tensor:
        """Compute ``(n_pairs, out)`` from ``(n_pairs, in)``, both sorted by expert."""
        y = x.new_empty(len(x), self.out_features)
        for expert, pairs, weight in self._dense(slices):
            if self.bias is None:
                torch.mm(x[pairs], weight, out=y[pairs])
            else:
                torch.addmm(self.bias[expert], x[pairs], weight, out=y[pairs])
            if self.lora_A is not None and self.lora_B is not None:
                y[pairs].addmm_(x[pairs] @ self.lora_A[expert].t(), self.lora_B[expert].t(), alpha=self.scaling)
        return y

    def input_gradient(self, grad_y: Tensor, slices: Slices) -> Tensor:
        """Compute the input's gradient ``(n_pairs, in)`` from the output's."""
        grad_x = grad_y.new_empty(len(grad_y), self.in_features)
        for expert, pairs, weight in self._dense(slices):
            torch.mm(grad_y[pairs], weight.t(), out=grad_x[pairs])
            if self.lora_A is not None and self.lora_B is not None:
                grad_x[pairs].addmm_(grad_y[pairs] @ self.lora_B[expert], self.lora_A[expert], alpha=self.scaling)
        return grad_x

    def adapter_gradients(
        self, x: Tensor, grad_y: Tensor, slices: Slices, pair_weights: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of A and B; ``pair_weights`` ``(n_pairs, 1)`` are factors on ``grad_y``."""
        if self.lora_A is None or self.lora_B is None:
            return None, None
        grad_A = torch.zeros_like(self.lora_A, dtype=torch.float32)
        grad_B = torch.zeros_like(self.lora_B, dtype=torch.float32)
        for expert, pairs in slices.items():
            xa, grad_xa = x[pairs] @ self.lora_A[expert].t(), grad_y[pairs] @ self.lora_B[expert]  # (…, rank)
            if pair_weights is not None:
                xa, grad_xa = xa * pair_weights[pairs], grad_xa * pair_weights[pairs]
            grad_A[expert] = master_gradient(grad_xa.t(), x[pairs], self.scaling)
            grad_B[expert] = master_gradient(grad_y[pairs].t(), xa, self.scaling)
        return grad_A.flatten(0, 1), grad_B.permute(1, 2, 0).flatten(1)


class ExpertsFunction(torch.autograd.Function):
    """Compute ``Σ_k weight_k · expert_k(x)`` for each token, saving the first products and the routing for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        top_k_weights: Tensor,
        top_k_index: Tensor,
        experts: Any,
        up: ExpertWeights,
        down: ExpertWeights,
        *_: Tensor | None,
    ) -> Tensor:
        """Compute ``(n_tokens, width)`` from ``hidden`` of the same shape; adapters come last.

        ``top_k_weights`` and ``top_k_index`` are ``(n_tokens, top_k)``.
        """
        order, inverse, slices = sort_by_expert(top_k_index, experts.num_experts)
        states = up.multiply(hidden[order // top_k_index.shape[1]], slices)  # (n_pairs, width of gate and up)
        output = down.multiply(_activate(experts, states), slices)
        output *= top_k_weights.reshape(-1)[order, None]
        x = None if up.lora_A is None else hidden
        ctx.save_for_backward(x, states, top_k_weights, order, inverse)
        ctx.experts, ctx.up, ctx.down, ctx.slices = experts, up, down, slices
        return output[inverse].view(*top_k_index.shape, -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, states, top_k_weights, order, inverse = ctx.saved_tensors
        up, down, slices = ctx.up, ctx.down, ctx.slices
        tokens, pair_weights = order // top_k_weights.shape[1], top_k_weights.reshape(-1)[order, None]
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            activated = _activate(ctx.experts, states)
        grad = grad_output[tokens]  # (n_pairs, width), without the pairs' weights
        grads_down = down.adapter_gradients(activated.detach(), grad, slices, pair_weights.to(grad.dtype))
        grad_activated = down.input_gradient(grad, slices)
        # the product of output and output gradient equals the product of activation and activation gradient
        grad_weights = (grad_activated * activated.detach()).sum(-1, dtype=torch.float32)
        for expert, pairs in slices.items() if down.bias is not None else ():
            grad_weights[pairs] += grad[pairs] @ down.bias[expert]
        del grad
        grad_activated *= pair_weights
        (grad_states,) = torch.autograd.grad(activated, states, grad_activated)
        grads_up = (None, None) if x is None else up.adapter_gradients(x[tokens], grad_states, slices)
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = up.input_gradient(grad_states, slices)[inverse].view(*top_k_weights.shape, -1).sum(1)
        grad_weights = grad_weights[inverse].view_as(top_k_weights).to(top_k_weights.dtype)
        return grad_hidden, grad_weights, None, None, None, None, *grads_up, *grads_down


def _activate(experts: Any, states: Tensor) -> Tensor:
    return cast(Tensor, experts._apply_gate(states) if experts.has_gate else experts.act_fn(states))


def run_experts(
    experts: Any,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    adapters: Mapping[str, tuple[float, Tensor, Tensor]] = MappingProxyType({}),
) -> Tensor:
    """Run the forward of a transformers experts module; ``adapters`` maps a weight's name to its scaling, A and B."""
    device = device_of_autocast(hidden)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        products = [
            ExpertWeights(experts, name, dtype, *adapters.get(name, (1.0, None, None)))
            for name in weight_names(experts)
        ]
        tensors = [tensor for product in products for tensor in product.adapters]
        output = ExpertsFunction.apply(hidden.to(dtype), top_k_weights, top_k_index, experts, *products, *tensors)
    return cast(Tensor, output).to(hidden.dtype)


# ---- adapters --------------------------------------------------------------------------------------------------------


class FusedExperts(Fused):
    """PEFT's LoRA on an experts weight, wrapped around the experts or around another such wrapper.

    PEFT's own forward would make dense weights for all experts. Saving and merging remain PEFT's.
    """

    fallback_reason = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts with the adapters of all wrappers around them."""
        layer: Any = self
        adapters = {}
        while isinstance(layer, ParamWrapper):
            lora_A, lora_B = active_lora(layer)
            if lora_A is not None and lora_B is not None and not layer.merged:
                adapters[layer.parameter_name] = layer.scaling[layer.active_adapters[0]], lora_A, lora_B
            layer = layer.base_layer
        return run_experts(layer, *args, adapters=adapters, **kwargs)


@contextlib.contextmanager
def adapting_experts(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """Show PEFT the shapes of packed weights as parameters, and replace its wrappers with ours afterwards."""
    if config.target_parameters and not ADAPTS_EXPERTS:
        raise UserError("Adapters on experts require PEFT 0.20 or newer: update peft.", "peft.version")
    hidden_names = []
    for experts in experts_of(model).values() if config.target_parameters else ():
        for name in weight_names(experts):
            if (packed := getattr(experts, packed_name(name), None)) is not None:
                shape = torch.empty((1, 1, 1), dtype=torch.float32, device=packed.weight.device)
                setattr(experts, name, nn.Parameter(shape.expand(packed.weight.quant_state.shape), requires_grad=False))
                hidden_names.append((experts, name))
    try:
        yield
    finally:
        for experts, name in hidden_names:
            delattr(experts, name)
    for name, module in list(model.named_modules()):
        if type(module) is ParamWrapper:
            model.set_submodule(name, FusedExperts.from_layer(module))


def expert_parameters(model: nn.Module) -> list[str]:
    """Return the full names of all experts' weights, in the form of PEFT's ``target_parameters``."""
    return [f"{name}.{weight}" for name, experts in experts_of(model).items() for weight in weight_names(experts)]
