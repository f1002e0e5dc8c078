"""Counts what decoder layers keep for backward: by hand those of LLaMA, by a run without numbers all others."""

import contextlib
import logging
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.anatomy import runs_flat
from qlora_lightning.model.layers import attention as flat
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer
from qlora_lightning.model.step.batch import most_positions
from qlora_lightning.model.step.layout import samples_of_lengths
from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.versions import attend_ragged

FLOAT = 4  # bytes of a float32
_TOKENS = 1024  # of the run on the meta device


def count_saved(causal_lm: Any, layers: Sequence[Any], dtype: torch.dtype) -> float:
    """Return the bytes a token that a layer keeps for backward, on average.

    Of fused layers it is what the functions of layers/decoder_layer.py save; a model with any other is run on the meta
    device, the whole of it: some types share keys and values, or tables of embeddings, between layers.
    """
    if all(map(is_fused, layers)):
        return fmean(_count_by_hand(causal_lm, each, dtype) for each in layers)
    tokens = min(_TOKENS, most_positions(causal_lm.config) or _TOKENS)
    return _run_saving(causal_lm, tokens, dtype) / tokens / len(layers)


def _count_by_hand(causal_lm: Any, layer: Any, dtype: torch.dtype) -> float:
    attention, width = layer.self_attn, causal_lm.config.hidden_size
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    heads = queries // attention.head_dim
    ranks = sum(sum(each.r.values()) for each in layer.modules() if isinstance(each, LoraLayer))
    # inputs of both norms; queries and attention's output; keys and values; gate and up; x A of all adapters
    numbers = 2 * width + 2 * queries + 2 * keys + 2 * layer.mlp.gate_proj.out_features + ranks
    floats = 2 + heads  # inverse root mean squares of the norms; log-sum-exp of attention's scores
    if hasattr(attention, "q_norm"):  # queries and keys before their norms
        numbers, floats = numbers + queries + keys, floats + (queries + keys) // attention.head_dim
    return float(numbers * dtype.itemsize + floats * FLOAT)


def is_fused(layer: nn.Module) -> bool:
    """Whether a layer runs as the functions of layers/decoder_layer.py, whose memory is known by hand."""
    return isinstance(layer, FusedDecoderLayer) and layer.plain_reason is None


def _run_saving(causal_lm: Any, tokens: int, dtype: torch.dtype) -> int:
    """Run a model forward up to its head on the meta device, and return the bytes that autograd keeps, but for weights.

    Attention keeps what a GPU's kernel keeps.
    """
    body, device = causal_lm.base_model, torch.device("meta")
    # as autocast has the adapters, whose copies are a part of their own
    adapters = {name: each.detach().to(dtype).requires_grad_() for name, each in trainable_tensors(body).items()}
    weights = [*body.parameters(), *body.buffers(), *adapters.values()]
    ids, samples = torch.zeros(1, tokens, dtype=torch.long, device=device), samples_of_lengths([tokens]).to(device)
    options = {"attention_mask": flat.NO_MASK, "position_ids": ids}
    mode: Any = contextlib.nullcontext()
    if not runs_flat(causal_lm.config):  # transformers makes a mask and looks for numbers in it, but for fake tensors
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        options, weights = {}, [*weights, *map(mode.from_tensor, weights)]
    saved = set[Any]()

    def keep(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage())  # once, whatever views of it are kept
        return tensor

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if query.shape[-1] != value.shape[-1]:  # no kernel has it
            return flat.flat_attention(module, query, key, value, mask, **options)
        return attend_ragged(query, key, value, samples.cu_seqlens, tokens, scale=None), None

    for name in (flat.FLAT_ATTENTION, "sdpa"):
        AttentionInterface.register(name, attend)
    try:  # int8 layers warn in each run that they round their input to float16
        with (
            quiet_loggers(logging.CRITICAL, "bitsandbytes.autograd._functions", "torch._subclasses.fake_tensor"),
            saved_tensors_hooks(keep, lambda x: x),
            flat.flat_batch(flat.FlatBatch(samples)),
            mode,
        ):
            functional_call(body, adapters, (ids,), {**options, "use_cache": False})
    finally:
        flat.register_flat_attention()
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    return sum(each.nbytes() for each in saved - {each.untyped_storage() for each in weights})
