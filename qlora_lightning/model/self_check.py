"""Compare what a device computes fused with what transformers, PEFT and torch compute, before it is trusted.

A kernel may be compiled wrongly for a GPU, or an operator of torch may change its meaning. A table of cases, on random
inputs: each kernel of Triton, attention, one decoder layer of the loaded model, and the loss, forward and backward.
Nothing is drawn from the run's generators, and the model is as it was afterwards.
"""
# mypy: allow-untyped-calls

import contextlib
import copy
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from lightning import Callback, LightningModule, Trainer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.layers import attention, elementwise, lora
from qlora_lightning.model.layers.attention import PackedPass, packed_pass
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, prepare_layers
from qlora_lightning.model.layers.experts import experts_of
from qlora_lightning.model.layers.select import choose_layers, choose_precision, library_layers
from qlora_lightning.model.model_types import decoder_layers, runs_packed
from qlora_lightning.model.step import loss
from qlora_lightning.model.step.forward import compute_states, evaluation_mode
from qlora_lightning.model.step.layout import MicroBatch, lay_out
from qlora_lightning.sources.cache import Json, cached_folder
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError, describe_error, is_out_of_memory
from qlora_lightning.support.trainer import gather_lists, say_once
from qlora_lightning.version import __version__

CHECKED_DEVICES = ("cuda",)  # types of those that a fit checks
# Distances in norm that are allowed: of a kernel, which rounds once or twice, and of attention, the loss or a layer,
# which round some ten times.
_OF_KERNEL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_OF_PATH = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_OF_MIXTURE = 0.25  # a rounding may send a token that is near a tie to another expert
# A layer may differ by more, as with large biases: by so many times what one more rounding of each linear's output
# changes.
_NOISE_FACTOR, _MOST_ALLOWED = 4, 0.5
_LENGTHS = (140, 1, 45)  # more than a tile of attention, a token alone; the first and the last begin alike
_SHARED = 24
_ROWS = 33


class Comparison(NamedTuple):
    """A number of the fused path beside the plain one's.

    Attributes:
        part: ``kernel``, ``attention``, ``layer`` or ``loss``.
        name: What is compared.
        distance: Norm of the difference over that of the plain path's; infinity for an error.
        limit: The largest distance that rounding explains.
    """

    part: str
    name: str
    distance: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether both compute the same, within rounding; NaN does not."""
        return self.distance <= self.limit

    def __str__(self) -> str:
        return f"{self.part} {self.name} ({self.distance:.2g}, allowed {self.limit:.2g})"


def find_faults(causal_lm: Any, dtype: torch.dtype) -> list[Comparison]:
    """Return what disagrees on the device of a model, in the dtype of its products."""
    return [each for each in compare_paths(causal_lm, dtype) if not each.agrees]


def compare_paths(causal_lm: Any, dtype: torch.dtype) -> list[Comparison]:
    """Compare kernels first, then attention, a layer and the loss: without the kernels if one of them disagrees."""
    layer = _checked_layer(causal_lm)
    device = next(layer.parameters()).device
    on_card = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_card, evaluation_mode(causal_lm):
        kernels = elementwise.triton_kernels(device.type)
        compared = [] if kernels is None else list(_compare_kernels(kernels, causal_lm, layer, _Draw(device, dtype)))
        with contextlib.nullcontext() if all(each.agrees for each in compared) else elementwise.without_kernels():
            compared += _compare_parts(causal_lm, layer, _Draw(device, dtype))
    return compared


class SelfCheck(Callback):
    """Check the device at the start of a run of any kind, before a fit prints its plan, which the check may change.

    The module adds it in ``configure_callbacks``.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_device(pl_module, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":  # which has been checked
            check_device(pl_module, trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_device(pl_module, trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_device(pl_module, trainer)


def check_device(module: Any, trainer: Trainer | None) -> None:
    """Check a CUDA device before it is used; what disagrees in any of the Trainer's processes runs plain in all.

    A sharded base is not checked: its layers are whole in a pass of all processes only.
    """
    device = module.device
    if not module.fast or module.sharded_base is not None or device.type not in CHECKED_DEVICES:
        return
    faults: list[Comparison] = []
    try:
        faults = _remembered_faults(module.causal_lm, module.precision.dtype)
    except Exception as error:  # no verdict: if memory ran out, a step will tell
        if not is_out_of_memory(error):
            say(f"The fused layers were not checked on {name_device(device)}: {describe_error(error)}")
    if device.type == "cuda":  # what it took is no part of a step's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    faults = faults if trainer is None else gather_lists(trainer, faults)
    if not faults:
        return
    remedy = "torch's operations take the place of Triton's kernels"
    if any(fault.part == "kernel" for fault in faults):
        elementwise.distrust_kernels()
    if any(fault.part != "kernel" for fault in faults):
        remedy = "the layers of PEFT and transformers run, as with model.fast: false"
        module.use_plain_path()
        if trainer is not None and trainer.state.fn == "fit":
            module.token_budget.plan(module)
    names = list(dict.fromkeys(map(str, faults)))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    say_once(
        f"Warning: {name_device(device)} computes something else than the libraries: {', '.join(names[:3])}{more}. So "
        f"{remedy}: slower, and right. Please open an issue with this line, and with what `qlora-lightning plan "
        "--check` prints for this config."
    )


def name_device(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this CPU ({platform.machine()})"


def _remembered_faults(causal_lm: Any, dtype: torch.dtype) -> list[Comparison]:
    """Return what :func:`find_faults` found at an earlier start with this GPU, versions and shapes, or finds now."""
    layer, head = _checked_layer(causal_lm), causal_lm.get_output_embeddings()
    device = next(layer.parameters()).device
    card = name_device(device)
    states = [(name, each, getattr(each, "quant_state", None)) for name, each in layer.named_parameters()]
    shapes: list[Json] = [
        f"{name} {each.dtype} {tuple(each.shape)} {state and (state.quant_type, state.nested)}"
        for name, each, state in states
    ]
    key: dict[str, Json] = {"card": card, "dtype": str(dtype), "type": causal_lm.config.model_type, "layer": shapes}
    key |= {"head": list(head.weight.shape), "versions": library_versions()}
    # of two models of one type and the same shapes, heads may differ, or what keeps a layer from running fused
    config = {name: value for name, value in causal_lm.config.to_diff_dict().items() if not name.startswith("_")}
    fallbacks: list[Json] = [*choose_layers(causal_lm).layers.values()]
    key |= {"config": json.loads(json.dumps(config, default=str)), "fallbacks": fallbacks}
    key["matmul"] = torch.get_float32_matmul_precision()
    found: list[Comparison] | None = None

    def build(folder: Path) -> None:
        nonlocal found
        found = find_faults(causal_lm, dtype)
        (folder / "faults.json").write_text(json.dumps(found), encoding="utf-8")

    with contextlib.suppress(UserError):  # the cache cannot keep it
        folder = cached_folder("checks", key, build, f"{causal_lm.config.model_type} on {card}")
        kept = [Comparison(*fault) for fault in json.loads((folder / "faults.json").read_text(encoding="utf-8"))]
        if found is None and all(math.isfinite(fault.distance) for fault in kept):
            return kept  # an error, as of a missing compiler, may be gone now
    return find_faults(causal_lm, dtype) if found is None else found


def library_versions() -> dict[str, Json]:
    """Return the versions on which it depends what is computed."""
    versions: dict[str, Json] = {"qlora_lightning": __version__, "torch": torch.__version__}
    for name in ("triton", "bitsandbytes", "transformers", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _checked_layer(causal_lm: Any) -> Any:
    """Return the first decoder layer that trains."""
    layers = decoder_layers(causal_lm)
    return next((layer for layer in layers if trainable_tensors(layer)), layers[0])


class _Draw:
    """Draws on the host: the same numbers on each device, and none of the run's own."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(0)

    def __call__(self, *sizes: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(sizes, generator=self.generator) * std
        return drawn.to(self.dtype).to(self.device)  # rounded on the host


def _distances(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return norms of differences over those of what is expected; the host reads all at once."""
    norms = []
    for one, other in zip(found, expected, strict=True):
        one, other = (each.detach() if each.is_floating_point() else each.float() for each in (one, other))
        size = torch.linalg.vector_norm(other, dtype=torch.promote_types(other.dtype, torch.float32))
        in_place = one.dtype == other.dtype and one.is_contiguous()  # dense weights are large
        difference = one.sub_(other) if in_place else one - other
        norms += [torch.linalg.vector_norm(difference, dtype=size.dtype), size]
    numbers = torch.stack(norms).tolist()
    return [error / max(size, 1e-30) for error, size in zip(numbers[::2], numbers[1::2], strict=True)]


# ---- kernels against torch's operations in float64 -------------------------------------------------------------------


def _compare_kernels(kernels: Any, causal_lm: Any, layer: Any, draw: _Draw) -> Iterator[Comparison]:
    limit = _OF_KERNEL[draw.dtype]
    for function, *arguments in _kernel_cases(causal_lm, layer, draw):
        name, results = f"{function.__name__} {'×'.join(map(str, _shape(*arguments)))}", []
        plain: Any = function.__wrapped__
        for run, dtype in ((plain, torch.float64), (getattr(kernels, function.__name__), draw.dtype)):
            is_float = [isinstance(each, Tensor) and each.is_floating_point() for each in arguments]
            copies = [
                each.to(torch.promote_types(each.dtype, dtype), copy=True) if floats else each
                for each, floats in zip(arguments, is_float, strict=True)
            ]
            try:
                outputs = run(*copies)
            except Exception as error:  # from Triton or its compiler
                if is_out_of_memory(error):
                    raise
                yield Comparison("kernel", f"{name}: {describe_error(error)}", math.inf, limit)
                break
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            overwritten = copies[:1] if function is loss.cross_entropy else []  # by the gradient
            results.append([*outputs, *overwritten])
        else:
            yield Comparison("kernel", name, max(_distances(results[1], results[0])), limit)


def _shape(first: Tensor, second: Any, *_: Any) -> Sequence[int]:
    return second.shape if isinstance(second, QuantState) else first.shape


def _kernel_cases(causal_lm: Any, layer: Any, draw: _Draw) -> Iterator[tuple[Any, ...]]:
    """Yield each kernel that a step launches, and its arguments at the model's widths."""
    packed = [each.weight for each in layer.modules() if isinstance(each, bnb.nn.Linear4bit)]
    for weight in {each.numel(): each for each in packed}.values():
        yield lora.dequantize, *_last_weights(weight)
    if isinstance(layer, FusedDecoderLayer):
        attn = layer.self_attn
        norms = [(layer.input_layernorm, _ROWS)]
        if hasattr(attn, "q_norm"):  # of a row for each head
            norms.append((attn.q_norm, _ROWS * lora.base_linear(attn.q_proj).out_features // attn.head_dim))
        for norm, rows in norms:
            weight, eps = norm.weight.detach(), norm.variance_epsilon
            x, grad, residual = (draw(rows, len(weight)) for _ in range(3))
            yield elementwise.rms_norm, x, weight, eps
            inverse_rms = torch.linspace(0.5, 2.0, rows, device=draw.device)[:, None]
            yield elementwise.rms_norm_backward, grad, x, weight, inverse_rms, residual
        gate, up, grad = (draw(_ROWS, lora.base_linear(layer.mlp.gate_proj).out_features) for _ in range(3))
        yield elementwise.swiglu, gate, up
        yield elementwise.swiglu_backward, gate, up, grad
        query, key, _ = _attention_states(layer, _ROWS, draw)
        angles = draw(1, _ROWS, query.shape[-1] // 2).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        yield elementwise.rotate, query, key, cos, sin, 1
        yield elementwise.rotate, query, key, cos, sin, -1  # backward
    if loss.is_frozen_linear(head := loss.lm_head_of(causal_lm)):
        vocabulary = len(cast(Any, head).weight)
        yield loss.cross_entropy, draw(9, vocabulary, std=3.0), torch.arange(9, device=draw.device), True


def _last_weights(weight: Any) -> tuple[Tensor, QuantState]:
    """Return the last 16 million weights of a packed one, as a row: of all, two dense copies may take 1.9 GB."""
    state = copy.copy(weight.quant_state)
    step = state.blocksize * (state.state2.blocksize if state.nested else 1)
    start = max(0, state.shape.numel() - 2**24) // step * step
    state.shape = torch.Size((1, state.shape.numel() - start))
    state.absmax = state.absmax[start // state.blocksize :]
    if state.nested:
        state.state2 = copy.copy(state.state2)
        state.state2.absmax = state.state2.absmax[start // step :]
    return weight.data.view(torch.uint8)[start // 2 :], state


def _attention_states(layer: FusedDecoderLayer, tokens: int, draw: _Draw) -> list[Tensor]:
    """Return queries, keys and values, ``(tokens, heads, head_dim)``."""
    attn = layer.self_attn
    linears = [lora.base_linear(linear) for linear in (attn.q_proj, attn.k_proj, attn.v_proj)]
    return [draw(tokens, linear.out_features // attn.head_dim, attn.head_dim) for linear in linears]


# ---- attention, the loss and a layer: fused against plain ------------------------------------------------------------


def _compare_parts(causal_lm: Any, layer: Any, draw: _Draw) -> Iterator[Comparison]:
    is_packed = runs_packed(causal_lm.config)
    batch = _make_batch(len(causal_lm.get_input_embeddings().weight), _LENGTHS if is_packed else _LENGTHS[:1])
    batch = batch.to(draw.device)
    head, targets = loss.lm_head_of(causal_lm), batch.targets[:_ROWS]

    def attend(fused: bool, *states: Tensor) -> Tensor:
        query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in states)  # (1, heads, tokens, head_dim)
        with packed_pass(PackedPass(batch.sequences, fused=fused)):
            attn_out, _ = attention.packed_attention(layer.self_attn, query, key, value, None)
        return attn_out

    def token_losses(fused: bool, hidden: Tensor) -> Tensor:
        return loss.token_losses(hidden, targets, head, fused=fused)[0]

    if isinstance(layer, FusedDecoderLayer):
        states = zip(("query", "key", "value"), _attention_states(layer, batch.input_ids.shape[1], draw), strict=True)
        yield from _compare("attention", attend, dict(states), draw)
    if is_packed:
        yield from _compare("loss", token_losses, {"states": draw(len(targets), causal_lm.config.hidden_size)}, draw)

    # Each side computes in the dtypes that a fit gives it: the fused path casts what its layers do not cast themselves,
    # the plain one all, since PEFT's own layers would compute in float32.
    precision = choose_precision(causal_lm, choose_layers(causal_lm), draw.dtype)
    layers = prepare_layers(causal_lm) if is_packed and not precision.autocasts_layers else {}
    fused_autocast = precision.autocast(draw.device, whole=False)
    plain_autocast = torch.autocast(draw.device.type, draw.dtype, enabled=draw.dtype != torch.float32)
    with fused_autocast:
        arguments, options, hidden = _capture_arguments(causal_lm, layer, batch)

    def run_layer(fused: bool, hidden: Tensor, *_: Tensor) -> Tensor:
        # without a group a layer runs as transformers wrote it; library_layers lets PEFT's linears do so too
        groups, copies = {}, list[tuple[Tensor, Tensor]]()
        if fused and layer in layers:
            groups[layer] = layer.groups(copies)
            lora.copy_all(copies)
        with (
            packed_pass(PackedPass(batch.sequences, groups, fused) if is_packed else None),
            fused_autocast if fused else plain_autocast,
            contextlib.nullcontext() if fused else library_layers(layer),
        ):
            output = layer(hidden, *arguments, **options)
        return cast(Tensor, output if isinstance(output, Tensor) else output[0])

    with _random_adapters(layer, _Draw(draw.device, torch.float32)):
        inputs = {"input": draw(*hidden.shape).to(hidden.dtype), **trainable_tensors(layer)}
        yield from _compare("layer", run_layer, inputs, draw, layer)


def _compare(
    part: str, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], draw: _Draw, layer: Any = None
) -> Iterator[Comparison]:
    """Compare output and gradients of ``function(fused, *inputs)``."""
    tensors = [each if each.requires_grad else each.requires_grad_() for each in inputs.values()]
    direction: list[Tensor] = []

    def run(fused: bool) -> list[Tensor]:
        with torch.enable_grad():
            output = function(fused, *tensors)
            if not direction:
                direction.append(draw(*output.shape))
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            gradients = torch.autograd.grad(output, tensors, direction[0].to(output.dtype), **options)
        return [output.detach(), *gradients]

    limit = _OF_PATH[draw.dtype]
    if layer is not None and draw.dtype.itemsize == 2 and experts_of(layer):
        limit = _OF_MIXTURE
    if draw.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        limit = _OF_PATH[torch.float16]  # TF32 rounds as this does
    expected = run(False)
    try:
        distances = _distances(run(True), expected)
    except Exception as error:  # from torch or bitsandbytes: the plain path may do without it
        if is_out_of_memory(error):
            raise
        yield Comparison(part, describe_error(error), math.inf, limit)
        return
    limits = [limit] * len(expected)
    if layer is not None and not all(each <= limit for each in distances):  # as with large biases
        with _rounded_linears(layer, draw.dtype):
            noise = _distances(run(False), expected)
        limits = [max(limit, min(_NOISE_FACTOR * each, _MOST_ALLOWED)) for each in noise]
    names = ["output", *(f"gradient of {name.replace('.default.weight', '')}" for name in inputs)]
    yield from (Comparison(part, *each) for each in zip(names, distances, limits, strict=True))


def _make_batch(vocabulary: int, lengths: Sequence[int]) -> MicroBatch:
    """Make a packed batch, in which the first and the last sample begin alike if there are several."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(vocabulary, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, bounds[:-1]] = -100
    if len(lengths) > 1:
        first, last = slice(_SHARED), slice(-lengths[-1], _SHARED - lengths[-1])
        ids[0, last] = ids[0, first]
        labels[0, first] = labels[0, last] = -100  # what is shared has no label
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return lay_out({"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seqlens": bounds.int()})


class _Captured(Exception):
    """Ends a pass as soon as the layer's arguments are known."""


def _capture_arguments(
    causal_lm: Any, layer: nn.Module, batch: MicroBatch
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Return what a step hands to a layer beside the hidden states, and these."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((arguments, options))
        raise _Captured

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Captured):
            compute_states(causal_lm, batch, None, fused=True)
    finally:
        handle.remove()
    ((arguments, options),) = found
    return arguments[1:], options, arguments[0] if arguments else options.pop("hidden_states")


@contextlib.contextmanager
def _random_adapters(layer: nn.Module, draw: _Draw) -> Iterator[None]:
    """Give A and B of a layer random numbers for a while: a new B is zero, and hides all that A does."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module in cast(Iterator[Any], layer.modules()):
            for name, param in module.named_parameters() if isinstance(module, LoraLayer) else ():
                if param.requires_grad and "lora_" in name and param.ndim == 2:
                    # a quarter, so that what the base adds counts as well
                    scaling: float = max(map(abs, module.scaling.values())) or 1.0
                    factor = 0.25 / scaling if "lora_B" in name else 1.0
                    kept.append((param, param.data))
                    param.data = draw(*param.shape, std=factor * param.shape[-1] ** -0.5).to(param.dtype)
        yield
    finally:
        for param, values in reversed(kept):  # one may be inside two wrappers
            param.data = values


@contextlib.contextmanager
def _rounded_linears(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Change the output of each linear by what one more rounding would, for a while."""

    def add_noise(_: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        index: Tensor = torch.arange(output.numel(), dtype=torch.float32, device=output.device)
        noise = index.mul_(78.233).sin_().view(output.shape).to(output.dtype)
        return output.addcmul(output, noise, value=torch.finfo(dtype).eps)

    modules = layer.named_modules()
    linears = [each for name, each in modules if isinstance(each, nn.Linear) and "lora_" not in name]
    handles = [linear.register_forward_hook(add_noise) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
