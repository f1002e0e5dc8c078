"""The peak memory of a training step on a CUDA device: one formula, from shapes alone, that can be computed by hand.

    peak = base + scales + vocabulary           in their stored form, or a process's share of them
         + trainable numbers · (4 weight + 4 gradient + 8 averages of AdamW + 2 copy in 16 bits)
         + context                              of CUDA, an estimate
         + tokens · activations                 of all layers and the head, saved for backward
         + workspace                            of the head or of one layer's backward, whichever takes more

For Llama-3.1-8B with rank 8 a layer saves 94,456 bytes a token, or with checkpointing 8,192, its input.

It omits keys and values repeated for all heads, on GPUs before compute capability 8.0, in float32 and in torch 2.11;
attention's scores if no kernel avoids them; copies of shared beginnings of samples; fragments in torch's allocator.
It counts each token as labelled, and each optimizer as AdamW unless it is an 8-bit one. On a CPU it only tells whether
memory is short.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn

from qlora_lightning.model.adapters.inject import trainable_tensors
from qlora_lightning.model.anatomy import LINEARS, decoder_layers, linear_sizes, runs_flat
from qlora_lightning.model.layers.decoder_layer import PIECE_TOKENS
from qlora_lightning.model.memory.activations import FLOAT, count_saved, is_fused
from qlora_lightning.model.memory.checkpointing import Checkpointing
from qlora_lightning.model.sharded import shards_vocabulary
from qlora_lightning.model.step.loss import logits_chunk_size

CONTEXT_BYTES = 600_000_000  # bytes of CUDA's context, kernels and cuBLAS's workspace: some 300 to 600 MB, by GPU
_INDEX = 8  # bytes of a position


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step on one device.

    Attributes:
        fixed: Bytes by part that do not depend on the number of tokens.
        hidden: Bytes of a token's hidden state, which is the input of each layer.
        logits: Bytes of a token's logits.
        holds_logits: Whether the logits of all tokens exist at once: for a type that runs a row at a time.
        itemsize: Bytes of a number in the dtype of the products.
        layers: Number of decoder layers from the first that trains on; those below save nothing.
        saved: Bytes per token that one of these saves for backward, its input included.
        mlp: Bytes of a token's state inside the MLP; backward has four such at a time.
        in_pieces: Whether a checkpointed layer has gate and up of :data:`PIECE_TOKENS` tokens at a time.
        dense: Bytes of the largest quantized weight, dequantized for a product.
        gathered: Bytes of a sharded base that are gathered at a time: in a layer, in the head.
        host_base: Bytes of a sharded base in host memory.
    """

    fixed: dict[str, int]
    hidden: int
    logits: int
    holds_logits: bool
    itemsize: int
    layers: int
    saved: float
    mlp: int
    in_pieces: bool
    dense: int
    gathered: tuple[int, int]
    host_base: int

    def parts(self, tokens: int, choice: Checkpointing) -> dict[str, int]:
        """Return the bytes at the peak by part, for a micro-batch of so many computed tokens; the peak is their sum."""
        hidden, saved = float(tokens * self.hidden), tokens * self.saved
        saved_per_layer = saved if not choice.checkpointed else 0 if choice.offload else hidden
        # of the head: the last norm's input and its inverse norm in float32; a labelled state's gradient and index
        head = tokens * (self.hidden / self.itemsize * FLOAT + FLOAT + self.hidden + _INDEX)
        activations = head + self.layers * saved_per_layer
        mlp_tokens = min(tokens, PIECE_TOKENS) if choice.checkpointed and self.in_pieces else tokens
        layer_workspace = hidden + 4 * mlp_tokens * self.mlp + self.dense  # hidden for the output's gradient
        if choice.checkpointed:  # recomputes what it did not save
            layer_workspace += saved - 2 * (tokens - mlp_tokens) * self.mlp - saved_per_layer
        # the last norm's output, and its labelled states; logits of some tokens, and probabilities in float32
        rows = min(logits_chunk_size(self.logits // self.itemsize, self.itemsize, "cuda"), tokens)
        head_workspace = 2 * hidden + rows * self.logits * (1 + FLOAT / self.itemsize)
        if self.holds_logits:  # of each row, of all rows, and their gradient
            head_workspace += 3 * tokens * self.logits
        gathered, workspace = max(zip(self.gathered, (layer_workspace, head_workspace), strict=True), key=sum)
        return {**self.fixed, "gathered": gathered, "activations": round(activations), "workspace": round(workspace)}

    def host_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Return the bytes in host memory: a sharded base, and offloaded inputs of layers."""
        return self.host_base + choice.offload * self.layers * _pinned_bytes(tokens * self.hidden)


def build_step_memory(
    model: peft.PeftModel,
    dtype: torch.dtype,
    *,
    double_quant: bool = True,
    optimizer: Any = None,
    device_bytes: float = math.inf,
    processes: int = 1,
    sharded_offload: bool | None = None,
) -> StepMemory:
    """Build the formula of a model on the meta device whose fused layers are chosen.

    ``sharded_offload`` is ``None`` if each process holds the whole base; else whether the shards are in host memory.
    """
    causal_lm: Any = model.get_base_model()
    fixed, gathered, host_base = _count_base(causal_lm, processes, sharded_offload)
    linears = [module for module in causal_lm.modules() if isinstance(module, bnb.nn.Linear4bit)]
    scales = sum(linear.in_features * linear.out_features for linear in linears) // 64
    fixed["scales"] = scales * FLOAT
    # with double quantization they are bytes, and a float32 per 256 of these; unnest_scales of load/base_model.py makes
    # them float32 if this takes at most a twentieth of the free memory, unless the base is sharded
    free = device_bytes - CONTEXT_BYTES - sum(fixed.values()) + 3 * scales  # once the base is loaded
    if double_quant and (sharded_offload is not None or 20 * 3 * scales > free):
        fixed["scales"] = scales + scales // 256 * FLOAT
    n_trainable = sum(tensor.numel() for tensor in trainable_tensors(model).values())
    fixed["adapters"] = FLOAT * n_trainable
    fixed["gradients"] = FLOAT * n_trainable * (2 if processes > 1 else 1)  # DDP has a copy
    fixed["optimizer"] = (2 if "8bit" in str(optimizer) else 2 * FLOAT) * n_trainable
    fixed["copies"] = dtype.itemsize * n_trainable if dtype.itemsize < FLOAT else 0
    fixed["context"] = CONTEXT_BYTES

    layers = decoder_layers(causal_lm)
    if not trainable_tensors(causal_lm.get_input_embeddings()):
        first_trained = next((i for i, layer in enumerate(layers) if trainable_tensors(layer)), len(layers) - 1)
        layers = layers[first_trained:]
    sizes = [linear_sizes(module) for module in layers[-1].modules() if isinstance(module, LINEARS)]
    is_quantized = bool(linears) or any(isinstance(module, bnb.nn.Linear8bitLt) for module in layers[-1].modules())
    return StepMemory(
        fixed,
        hidden=causal_lm.config.hidden_size * dtype.itemsize,
        logits=len(causal_lm.get_output_embeddings().weight) * dtype.itemsize,
        holds_logits=not runs_flat(causal_lm.config),
        itemsize=dtype.itemsize,
        layers=len(layers),
        saved=count_saved(causal_lm, layers, dtype),
        mlp=max(map(max, sizes)) * dtype.itemsize,
        in_pieces=is_fused(layers[-1]),
        dense=max(map(math.prod, sizes)) * dtype.itemsize if is_quantized else 0,
        gathered=gathered,
        host_base=host_base,
    )


def _count_base(
    causal_lm: Any, processes: int, sharded_offload: bool | None
) -> tuple[dict[str, int], tuple[int, int], int]:
    """Count the bytes of a base without scales: what a process holds, what it gathers, and what is in host memory.

    FSDP2 gathers a layer into a buffer, and copies that to its parameters while it gathers the next one.
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
    """Return what a tensor takes in pinned host memory, which torch allocates in powers of two."""
    return 1 << max(0, size - 1).bit_length()
