"""What a decoder layer keeps for backward and makes on the way: learned by running it on torch's meta device.

Two rules stand for what that device does not show: :class:`_Attention` for the kernels of causal attention, and
:class:`LiveBytes` for weights that a CPU makes dense in tiles.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from qlora_lightning.model.layers import decoder_layer
from qlora_lightning.model.layers.attention import (
    FLAT_ATTENTION,
    attend_per_sample,
    attends_in,
    register_flat_attention,
)
from qlora_lightning.model.layers.lora import TILE_BYTES, runs_fused
from qlora_lightning.model.step.batch import BatchShape
from qlora_lightning.model.step.layout import whole_samples
from qlora_lightning.support.console import quiet_loggers


def measure_layers(
    model: peft.PeftModel,
    batch: BatchShape,
    device: str,
    dtype: torch.dtype,
    *,
    autocasts: bool = False,
    every_n_layers: int = 0,
    offload: bool = False,
) -> list[tuple[int, int]]:
    """Measure every decoder layer of a hollow model; layers that are alike are run once.

    Arguments are as those of :class:`~qlora_lightning.model.memory.plan.StepSettings`; layers are checkpointed from the
    first, as transformers does.

    Returns:
        Of each layer the bytes that forward leaves for backward, and the most that forward or backward have beside,
        gradients of its output and input included.
    """
    causal_lm: Any = model.get_base_model()
    config = causal_lm.config
    usual = config._attn_implementation == FLAT_ATTENTION and not getattr(config, "attention_dropout", 0)
    loops = bool(usual and device == "cpu" and attends_in(dtype))
    input_trains = any(each.requires_grad for each in causal_lm.get_input_embeddings().parameters())
    known: dict[tuple[str, bool, bool], tuple[int, int]] = {}
    found = []
    for number, layer in enumerate(causal_lm.model.layers):
        checkpointed = every_n_layers > 0 and number % every_n_layers == 0
        kind = repr(layer), input_trains, checkpointed  # its text names parts, shapes, ranks and dropout
        if kind not in known:
            run = _hollow_run(layer, config, batch, dtype, loops, autocasts)
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = checkpointed, _call  # _measure does it
            root = torch.empty(1, 1, config.hidden_size, dtype=dtype, device="meta", requires_grad=input_trains)
            live = LiveBytes(tiles=device == "cpu" and runs_fused(layer) and not autocasts)
            # whose 8-bit layers say in each run that they round their input to float16
            with quiet_loggers(logging.ERROR, "bitsandbytes.autograd._functions"):
                known[kind] = _measure(run, root.expand(1, batch.computed, -1), checkpointed, offload, live)
        found.append(known[kind])
        input_trains = input_trains or any(each.requires_grad for each in layer.parameters())
    return found


def rotated_width(config: Any) -> int:
    """Return how many numbers of a query or key are rotated by its position."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return int(width * rope.get("partial_rotary_factor", 1.0))


def _hollow_run(
    layer: nn.Module, config: Any, batch: BatchShape, dtype: torch.dtype, loops: bool, autocasts: bool
) -> Callable[[Tensor], Any]:
    """Return a layer's forward without numbers; gradients of its adapters are there, as from the second batch on."""
    adapters = {name: each.detach() for name, each in layer.named_parameters() if each.requires_grad}
    for each in adapters.values():
        each.requires_grad_().grad = torch.empty_like(each)
    angles = torch.empty(1, batch.computed, rotated_width(config), dtype=dtype, device="meta")
    samples = whole_samples(batch.attended)

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Any, None]:
        window = sliding_window
        if softcap is None and (window is None or window >= samples.longest):
            tokens = samples.bounds[-1]
            return _Attention.apply(query, key, value, tokens, loops), None  # type: ignore[no-untyped-call]
        places = torch.zeros(samples.bounds[-1], dtype=torch.int64, device="meta")  # as if expanded
        states = (each.index_select(2, places) for each in (query, key, value))
        mixed = attend_per_sample(*states, samples, scaling, 0.0, window, softcap)
        return mixed.index_select(1, places[: batch.computed]), None

    arguments = {
        "attention_mask": None,
        "samples": samples,
        "position_embeddings": (angles, angles),
        "use_cache": False,
    }

    def run(hidden: Tensor) -> Any:
        AttentionInterface.register(FLAT_ATTENTION, attend)
        try:
            with mock.patch.object(decoder_layer, "flat_attention", attend):
                if not autocasts:
                    return functional_call(layer, adapters, (hidden,), arguments)
                with torch.autocast("cpu", dtype), _CastLinears(dtype):  # layers ask the CPU whether it does
                    return functional_call(layer, adapters, (hidden,), arguments)
        finally:
            register_flat_attention()

    return run


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _measure(
    run: Callable[[Tensor], Any], states: Tensor, checkpointed: bool, offload: bool, live: "LiveBytes"
) -> tuple[int, int]:
    with live:
        hidden = states.contiguous()  # no leaf, which would be kept in any case
        offloaded = hidden.nbytes if checkpointed and offload else 0
        output = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False) if checkpointed else run(hidden)
        if not checkpointed:  # whose input is kept in any case
            del hidden
        saved = live.now - offloaded - output.nbytes  # which is the input of the next one
        workspace = live.peak - saved
        if output.requires_grad:
            live.peak = 0
            output.backward(torch.empty_like(output))
            workspace = max(workspace, live.peak - saved - output.nbytes)
    return saved, workspace


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors that operations make and that still exist; ``tiles``: dense weights come in tiles."""

    def __init__(self, tiles: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tiles, self.now, self.peak = tiles, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        seen = {each._cdata for each in _storages((args, kwargs))}  # views and what is written in place have theirs
        for storage in _storages(result):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                dense = self.tiles and func.namespace == "bitsandbytes"
                size = min(storage.nbytes(), TILE_BYTES) if dense else storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, size)
        return result

    def _remove(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(tree) if isinstance(each, Tensor)]


class _Attention(torch.autograd.Function):
    """Make and keep what attention does, without numbers.

    The C++ loops (:class:`~qlora_lightning.model.layers.attention.SampleAttention`) keep queries, keys and values of
    the stream, and two numbers a row. torch's kernels keep those of all tokens of the samples, which are laid out if
    they share some, one number a row, and the output.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tokens: int, loops: bool) -> Tensor:
        states = [each[0].transpose(0, 1).contiguous() for each in (query, key, value)]
        shares = tokens != len(states[0])
        mixed = torch.empty_like(states[0])
        if shares and not loops:
            states = [each.new_empty(tokens, *each.shape[1:]) for each in states]
        rows = states[0].new_empty(*states[0].shape[:2], 2 if loops else 1, dtype=torch.float32)
        ctx.save_for_backward(*states, rows, None if loops else torch.empty_like(states[0]))
        ctx.stream, ctx.parts = len(mixed), 2 * tokens if shares and loops else 0
        return mixed[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states = ctx.saved_tensors[:3]
        parts = states[1].new_empty(ctx.parts, *states[1].shape[1:], dtype=torch.float32)  # of shared keys and values
        grads = [torch.empty_like(each)[: ctx.stream].transpose(0, 1)[None] for each in states]
        del parts
        return *grads, None, None


class _CastLinears(TorchFunctionMode):
    """Autocast linears, which torch does not do on the meta device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = tuple(each.to(self.dtype) if isinstance(each, Tensor) else each for each in args)
        return func(*args, **(kwargs or {}))
