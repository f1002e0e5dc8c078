"""The peak memory of a training step on a CUDA device: one formula of shapes only, which can be computed by hand.

    peak = base + scales + vocabulary           in their stored form, or a process's share of them
         + trainable numbers · (4 weight + 4 gradient + 8 averages of AdamW + 2 copy in 16 bits)
         + buffers                              of cuBLAS, and what torch's allocator rounds up
         + context                              of CUDA, an estimate
         + tokens · activations                 of all layers, saved for backward
         + workspace                            of one layer or of the head, whichever takes more

For Llama-3.1-8B with rank 8, a layer saves 94,456 bytes per token. With checkpointing, it saves only its input, 8,192
bytes. A layer's workspace consists of a hidden state, the layer's output or its gradient, an MLP's state and a dense
weight. A checkpointed layer also needs what it saves. (With an int8 base, bitsandbytes' product may need more than
these. In a long stream, whose MLP is computed in pieces, attention's backward needs more: see _attention_bytes.) The
workspace of the head consists of three hidden states (saved by the last norm, used to predict labels, and the
gradient) and the logits of some tokens.

Layers that do not run fused are those of transformers and PEFT. They have no formula: the bytes that they save are an
estimate, chosen high (_plain_saved_bytes). The bytes that a mixer, such as a scan, saves are counted on a row without
numbers (_mixer_bytes).

The formula omits:

* gaps in torch's allocator (0.3 to 0.7 GiB of the device) and NCCL's buffers, which use part of the tenth of the memory
  that is left free
* attention's scores, if no kernel avoids them
* keys and values for all heads, if samples are computed one at a time: with narrow windows or sinks, on an older GPU
* copies of shared beginnings of samples
* the memory of torch's operations, if Triton does not work

It counts every token as labeled, and every optimizer as AdamW unless it is an 8-bit one. On a CPU, it only tells
whether memory is short.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_lightning.model.activation_checkpointing import Checkpointing
from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.layers.decoder_layer import PIECE_TOKENS, FusedDecoderLayer
from qlora_lightning.model.layers.experts import PackedExperts, experts_per_token
from qlora_lightning.model.layers.mixer import PackedMixer
from qlora_lightning.model.model_types import LINEARS, decoder_layers, linear_sizes, runs_packed
from qlora_lightning.model.sharded import shards_vocabulary
from qlora_lightning.model.step.layout import MOST_PADDING
from qlora_lightning.model.step.loss import is_frozen_linear, lm_head_of, logits_chunk_size

FLOAT = 4  # bytes of a float32
CONTEXT_BYTES = 600_000_000  # bytes of CUDA's context and kernels: about 300 to 600 MB, depending on the GPU
_CUBLAS_BYTES = 2 * 32 << 20  # workspaces of the forward and backward threads: 32 MiB each on 9.0, 8 on others
_ROUNDED = 0.03  # fraction of trained tensors: a block may be up to 1 MiB larger than requested
_BATCH_BYTES = 1024  # per token: ids, positions, angles, the loss
_MIXER_TOKENS = 512  # length of the row on which a mixer is counted
_PLAIN_MLP_STATES = 4  # in the backward of a layer that is not fused


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step on one device.

    Attributes:
        fixed: Bytes that do not depend on the number of tokens, by part.
        hidden: Bytes of a token's hidden state, the input of each layer.
        logits: Bytes of a token's logits, including the tensors that their loss makes from them.
        logit_rows: How many tokens have logits at a time.
        held_logits: Bytes of a token's logits, counted for all rows, for one row and for their gradient. 0 if only the
            logits of some tokens exist at a time. A type that runs a row at a time holds all of them.
        layers: Number of decoder layers, starting with the first that trains; layers below save nothing.
        saved: Bytes per token that one of these layers saves for backward, including its input.
        mlp: Bytes of a token's state inside the MLP.
        is_fused: Whether layers run fused. If so, only one such state exists in addition to the saved tensors, and a
            checkpointed layer has gate and up for :data:`PIECE_TOKENS` tokens at a time.
        attention: Bytes per token in attention's backward, not counting saved tensors; 0 if layers do not run fused.
        dense: Bytes of the largest quantized weight, dequantized for a product.
        int8: Bytes per token in the largest int8 product: int8 input, sums in int32 and in float16, and the output.
        gathered: Bytes of a sharded base gathered at a time: in a layer, in the head.
        host_base: Bytes of a sharded base in host memory.
    """

    fixed: dict[str, int]
    hidden: int
    logits: int
    logit_rows: int
    held_logits: int
    layers: int
    saved: float
    mlp: int
    is_fused: bool
    attention: int
    dense: int
    int8: int
    gathered: tuple[int, int]
    host_base: int

    def parts(self, tokens: int, choice: Checkpointing) -> dict[str, int]:
        """Return the peak bytes by part for a micro-batch of ``tokens`` computed tokens; the peak is their sum."""
        hidden, saved = float(tokens * self.hidden), tokens * self.saved
        saved_per_layer = saved if not choice.checkpointed else 0 if choice.offload else hidden
        mlp_tokens = min(tokens, PIECE_TOKENS) if choice.checkpointed and self.is_fused else tokens
        states = 1 if self.is_fused else _PLAIN_MLP_STATES
        mlp_workspace = hidden + max(states * mlp_tokens * self.mlp + self.dense, mlp_tokens * self.int8)
        attention_workspace = tokens * (self.attention - 2 * self.mlp)  # gate and up are no longer saved
        if choice.checkpointed:  # for the MLP's other pieces, the gradient exists, but gate and up do not
            mlp_workspace -= (tokens - mlp_tokens) * (2 * self.mlp - self.hidden)
        recomputed = saved - saved_per_layer if choice.checkpointed else 0
        layer_workspace = recomputed + max(mlp_workspace, attention_workspace)
        head_workspace = 3 * hidden + min(self.logit_rows, tokens) * self.logits + tokens * self.held_logits
        gathered, workspace = max(zip(self.gathered, (layer_workspace, head_workspace), strict=True), key=sum)
        activations, workspace = round(self.layers * saved_per_layer), round(workspace + tokens * _BATCH_BYTES)
        return {**self.fixed, "gathered": gathered, "activations": activations, "workspace": workspace}

    def host_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Return the bytes in host memory: a sharded base, and offloaded layer inputs."""
        return self.host_base + choice.offload * self.layers * _pinned_bytes(tokens * self.hidden)


def build_step_memory(
    model: peft.PeftModel,
    dtype: torch.dtype,
    *,
    double_quant: bool = True,
    optimizer: Any = None,
    processes: int = 1,
    sharded_offload: bool | None = None,
    row_tokens: float = 512,
) -> StepMemory:
    """Build the formula for a model on the meta device whose fused layers have been chosen.

    ``row_tokens`` is the length of short rows; attention's backward needs memory for 128 more tokens per row.
    ``sharded_offload`` is ``None`` if each process holds the entire base, else whether the shards are in host memory.
    """
    causal_lm: Any = model.get_base_model()
    fixed, gathered, host_base = _count_base(causal_lm, processes, sharded_offload)
    linears = [module for module in causal_lm.modules() if isinstance(module, bnb.nn.Linear4bit)]
    scales = sum(linear.in_features * linear.out_features for linear in linears) // 64
    fixed["scales"] = scales + scales // 256 * FLOAT if double_quant else scales * FLOAT
    n_trainable = sum(tensor.numel() for tensor in trainable_tensors(model).values())
    fixed["adapters"] = FLOAT * n_trainable
    fixed["gradients"] = FLOAT * n_trainable * (2 if processes > 1 else 1)  # DDP keeps a copy
    fixed["optimizer"] = (2 if "8bit" in str(optimizer) else 2 * FLOAT) * n_trainable
    fixed["copies"] = dtype.itemsize * n_trainable
    trained = sum(fixed[part] for part in ("adapters", "gradients", "optimizer", "copies"))
    fixed["buffers"] = _CUBLAS_BYTES + round(_ROUNDED * trained)
    fixed["context"] = CONTEXT_BYTES

    layers = decoder_layers(causal_lm)
    if not trainable_tensors(causal_lm.get_input_embeddings()):
        first_trained = next((i for i, layer in enumerate(layers) if trainable_tensors(layer)), len(layers) - 1)
        layers = layers[first_trained:]
    experts = [module for module in layers[-1].modules() if isinstance(module, PackedExperts)]
    modules = (module for module in layers[-1].modules() if isinstance(module, LINEARS) and module not in experts)
    sizes = [linear_sizes(module) for module in modules]
    dense = max([math.prod(size) for size in [*sizes, *(module.shape[1:] for module in experts)]])
    dense += max((math.prod(module.shape) // 64 * FLOAT // dtype.itemsize for module in experts), default=0)  # scales
    # one MLP state, or the states of all of a token's experts
    mlp = max([*map(max, sizes), *(experts_per_token(causal_lm.config) * max(module.shape[1:]) for module in experts)])
    in_int8 = [linear_sizes(module) for module in layers[-1].modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    found = {type(each): each for layer in layers for each in layer.children() if isinstance(each, PackedMixer)}
    row = math.ceil(min(row_tokens, _MIXER_TOKENS))
    mixers = {kind: _mixer_bytes(each, causal_lm.config.hidden_size, dtype, row) for kind, each in found.items()}
    head = lm_head_of(causal_lm)
    vocabulary = len(causal_lm.get_output_embeddings().weight)
    # a frozen head's gradient overwrites its logits; otherwise autograd keeps the logits in float32, their log-softmax
    # and the gradients of both
    logit_bytes = dtype.itemsize if is_frozen_linear(head) else 2 * dtype.itemsize + 3 * FLOAT
    return StepMemory(
        fixed,
        hidden=causal_lm.config.hidden_size * dtype.itemsize,
        logits=vocabulary * logit_bytes,
        logit_rows=logits_chunk_size(vocabulary, dtype.itemsize, "cuda"),
        held_logits=0 if runs_packed(causal_lm.config) else 3 * vocabulary * dtype.itemsize,
        layers=len(layers),
        saved=fmean(_saved_bytes(causal_lm.config, layer, dtype, mixers) for layer in layers),
        mlp=mlp * dtype.itemsize,
        is_fused=_is_fused(layers[-1]),
        attention=_attention_bytes(layers[-1], dtype, row_tokens) if _is_fused(layers[-1]) else 0,
        dense=dense * dtype.itemsize if linears or in_int8 else 0,
        int8=max((inputs + outputs * (4 + 2 + dtype.itemsize) for inputs, outputs in in_int8), default=0),
        gathered=gathered,
        host_base=host_base,
    )


def _is_fused(layer: nn.Module) -> bool:
    return isinstance(layer, FusedDecoderLayer) and layer.fallback_reason is None


def _saved_bytes(config: Any, layer: Any, dtype: torch.dtype, mixers: Mapping[type, float]) -> float:
    """Return the bytes per token that a layer saves for backward; ``mixers`` has the bytes for each mixer class."""
    if not _is_fused(layer):
        in_mixers = sum(mixers.get(type(module), 0.0) for module in layer.children())
        return _plain_saved_bytes(config, layer, dtype) + (1 + MOST_PADDING) * in_mixers
    attention = layer.self_attn
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    heads = queries // attention.head_dim
    ranks = sum(sum(module.r.values()) for module in layer.modules() if isinstance(module, LoraLayer))
    # inputs of both norms; queries and attention output; keys and values; gate and up; x A of all adapters
    elements = 2 * config.hidden_size + 2 * queries + 2 * keys + 2 * layer.mlp.gate_proj.out_features + ranks
    floats = 2 + heads  # inverse root mean squares of the norms; log-sum-exp of attention's scores
    if hasattr(attention, "q_norm"):  # queries and keys as inputs of their norms
        elements, floats = elements + queries + keys, floats + (queries + keys) // attention.head_dim
    return float(elements * dtype.itemsize + floats * FLOAT)


def _plain_saved_bytes(config: Any, layer: nn.Module, dtype: torch.dtype) -> float:
    """Estimate, on the high side, the bytes per token that a layer of transformers and PEFT saves for backward.

    Counts the inputs and outputs of all linears of the base twice, because as much is derived from them, plus eight
    hidden states in float32 for norms. A type that runs a row at a time, with scores or recurrent states, counts
    double. Autograd keeps 46 to 80 % of this for the shapes in the recipes, with or without dropout.
    """
    modules = [module for name, module in layer.named_modules() if ".lora_" not in name]
    experts = [module for module in modules if isinstance(module, PackedExperts)]
    sizes = [linear_sizes(module) for module in modules if isinstance(module, LINEARS) and module not in experts]
    expert_sizes = [module.shape[1:] for module in experts]
    expert_sizes += [weight.shape[1:] for weight in layer.parameters() if weight.dim() == 3]  # experts in 16 bits
    states = sum(map(sum, sizes)) + experts_per_token(config) * sum(map(sum, expert_sizes))
    saved = 2 * states * dtype.itemsize + 8 * config.hidden_size * FLOAT
    return float(saved if runs_packed(config) else 2 * saved)


def _mixer_bytes(mixer: Any, width: int, dtype: torch.dtype, row_tokens: int) -> float:
    """Return the bytes per token of a row that a mixer saves between its linears, with torch's operations.

    The mixer runs on the meta device, with dense linears instead of quantized ones. If kernels are installed, they save
    less.
    """
    linears = {name: each for name, each in mixer.named_children() if isinstance(each, (LoraLayer, *LINEARS))}
    saved: dict[Any, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    for name, linear in linears.items():
        mixer.set_submodule(name, nn.Linear(*linear_sizes(linear), device="meta", dtype=dtype).requires_grad_(False))
    states = torch.empty(1, row_tokens, width, device="meta", dtype=dtype, requires_grad=True)
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        mixer(states)
    weights = {param.untyped_storage() for param in mixer.parameters()}
    for name, linear in linears.items():
        mixer.set_submodule(name, linear)
    return sum(size for storage, size in saved.items() if storage not in weights) / row_tokens


def _attention_bytes(layer: Any, dtype: torch.dtype, row_tokens: float) -> int:
    """Return the bytes per token that FlashAttention's backward needs in a fused layer, for rows of ``row_tokens``.

    These are the gradients of its output and of the queries, also summed in float32, the gradients of keys and values
    for all query heads, and the sums of these.
    """
    queries, keys = layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features
    return int((4 * queries + 2 * keys) * dtype.itemsize + (1 + 128 / row_tokens) * queries * FLOAT)


def _count_base(
    causal_lm: Any, processes: int, sharded_offload: bool | None
) -> tuple[dict[str, int], tuple[int, int], int]:
    """Count the bytes of a base without scales: held by a process, gathered by it, and in host memory.

    FSDP2 gathers a layer into a buffer, and copies the buffer to the layer's parameters while it gathers the next one.
    """
    layers = decoder_layers(causal_lm)
    embeddings = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    base, vocabulary = _frozen_bytes([causal_lm]) - _frozen_bytes(embeddings), _frozen_bytes(embeddings)
    if sharded_offload is None:
        return {"base": base, "vocabulary": vocabulary}, (0, 0), 0
    embeddings = embeddings if shards_vocabulary(causal_lm) else []
    in_layers, in_embeddings = _frozen_bytes(layers), _frozen_bytes(embeddings)
    layer = max((_frozen_bytes([module]) for module in layers), default=0)  # the largest one
    embedding = max((_frozen_bytes([module]) for module in embeddings), default=0)
    base, vocabulary = base - in_layers, vocabulary - in_embeddings
    if sharded_offload:
        host_bytes = sum(_pinned_bytes(param.nbytes // processes) for param in _frozen_params([*layers, *embeddings]))
        return {"base": base, "vocabulary": vocabulary}, (2 * layer + layer // processes, 2 * embedding), host_bytes
    base, vocabulary = base + in_layers // processes, vocabulary + in_embeddings // processes
    return {"base": base, "vocabulary": vocabulary}, (2 * layer, 2 * embedding), 0


def _frozen_params(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    return {param for module in modules for param in module.parameters() if not param.requires_grad}


def _frozen_bytes(modules: Sequence[nn.Module]) -> int:
    return sum(param.nbytes for param in _frozen_params(modules))


def _pinned_bytes(size: int) -> int:
    """Return a tensor's bytes in pinned host memory, which torch allocates in powers of two."""
    return 1 << max(0, size - 1).bit_length()
