"""Count what decoder layers save for backward: by formula for LLaMA, by a run on the meta device for all others."""

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
from qlora_lightning.model.step.layout import sequences_of_lengths
from qlora_lightning.model.step.packed import most_positions
from qlora_lightning.support.console import quiet_loggers

FLOAT = 4  # bytes of a float32
_RUN_TOKENS = 1024  # of the run on the meta device


def count_saved(causal_lm: Any, layers: Sequence[Any], dtype: torch.dtype) -> float:
    """Return the bytes per token that a layer saves for backward, on average.

    Fused layers save what the functions of layers/decoder_layer.py do; a model with any other layer is run as a whole
    on the meta device: some types share keys and values, or tables of embeddings, between layers.
    """
    if all(map(is_fused, layers)):
        return fmean(_fused_saved_bytes(causal_lm, layer, dtype) for layer in layers)
    n_tokens = min(_RUN_TOKENS, most_positions(causal_lm.config) or _RUN_TOKENS)
    return _run_saved_bytes(causal_lm, n_tokens, dtype) / n_tokens / len(layers)


def _fused_saved_bytes(causal_lm: Any, layer: Any, dtype: torch.dtype) -> float:
    attention, width = layer.self_attn, causal_lm.config.hidden_size
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    heads = queries // attention.head_dim
    ranks = sum(sum(module.r.values()) for module in layer.modules() if isinstance(module, LoraLayer))
    # inputs of both norms; queries and attention's output; keys and values; gate and up; x A of all adapters
    elements = 2 * width + 2 * queries + 2 * keys + 2 * layer.mlp.gate_proj.out_features + ranks
    floats = 2 + heads  # inverse root mean squares of the norms; log-sum-exp of attention's scores
    if hasattr(attention, "q_norm"):  # queries and keys before their norms
        elements, floats = elements + queries + keys, floats + (queries + keys) // attention.head_dim
    return float(elements * dtype.itemsize + floats * FLOAT)


def attention_bytes(layer: Any, dtype: torch.dtype) -> int:
    """Return the bytes per token that FlashAttention's backward takes in a fused layer.

    These are the gradients of its output and of queries, those summed in float32, gradients of keys and values for all
    heads of queries, and their sums.
    """
    queries, keys = layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features
    return int((4 * queries + 2 * keys) * dtype.itemsize + 1.25 * queries * FLOAT)  # 128 tokens more a sample


def is_fused(layer: nn.Module) -> bool:
    """Whether a layer runs as the functions of layers/decoder_layer.py, whose memory has a formula."""
    return isinstance(layer, FusedDecoderLayer) and layer.plain_reason is None


def _run_saved_bytes(causal_lm: Any, n_tokens: int, dtype: torch.dtype) -> int:
    """Run a model up to its head on the meta device, and return the bytes that autograd saves, weights excluded.

    Attention saves what a GPU's kernel does.
    """
    body, device = causal_lm.base_model, torch.device("meta")
    # in the dtype that autocast gives the adapters; the copies are counted elsewhere
    adapters = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in trainable_tensors(body).items()}
    weights = [*body.parameters(), *body.buffers(), *adapters.values()]
    input_ids = torch.zeros(1, n_tokens, dtype=torch.long, device=device)
    sequences = sequences_of_lengths([n_tokens]).to(device)
    options = {"attention_mask": flat.NO_MASK, "position_ids": input_ids}
    mode: Any = contextlib.nullcontext()
    if not runs_flat(causal_lm.config):  # transformers builds a mask and reads it, except for fake tensors
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        options, weights = {}, [*weights, *map(mode.from_tensor, weights)]
    storages = set[Any]()

    def record(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage())  # once, whatever views of it are saved
        return tensor

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if query.shape[-1] != value.shape[-1]:  # no kernel takes it
            return flat.flat_attention(module, query, key, value, mask, **options)
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        return flat.attend_ragged(query, key, value, sequences, None, None).unsqueeze(0), None

    for name in (flat.FLAT_ATTENTION, "sdpa"):
        AttentionInterface.register(name, attend)
    try:  # int8 layers warn in each run that they round their input to float16
        with (
            quiet_loggers(logging.CRITICAL, "bitsandbytes.autograd._functions", "torch._subclasses.fake_tensor"),
            saved_tensors_hooks(record, lambda x: x),
            flat.flat_batch(flat.FlatBatch(sequences)),
            mode,
        ):
            functional_call(body, adapters, (input_ids,), {**options, "use_cache": False})
    finally:
        flat.register_flat_attention()
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    return sum(storage.nbytes() for storage in storages - {weight.untyped_storage() for weight in weights})
