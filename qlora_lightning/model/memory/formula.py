"""The peak memory of a training step on a CUDA device: one formula, from shapes alone, to be followed on paper.

    peak = base + scales + vocabulary           as they are held, or a process's share of them
         + numbers that train · (4 weight + 4 gradient + 8 averages of AdamW + 2 copy in 16 bits)
         + context                              of CUDA, an estimate
         + tokens · activations                 of all layers and the head, kept until backward
         + workspace                            of the head or of one layer's backward, whichever takes more

Of Llama-3.1-8B with rank 8 a layer keeps 94,456 bytes a token, or with checkpointing 8,192, its input.

It forgets keys and values repeated for all heads, on cards before compute capability 8.0, in float32 and in torch 2.11;
attention's scores where no kernel spares them; copies of beginnings that samples share; fragments in torch's allocator.
It takes each token for labelled and each optimizer for AdamW, if it is none in 8 bits. The peak of the first steps
corrects it once. A CPU's memory is measured, not planned.
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

CONTEXT_BYTES = 600_000_000  # bytes of CUDA's context, kernels and cuBLAS's workspace: some 300 to 600 MB, by card
_INDEX = 8  # bytes of a position


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step on one device.

    Attributes:
        fixed: Bytes by part of what does not depend on tokens.
        hidden: Bytes of a token's hidden state, which is the input of each layer.
        logits: Bytes of a token's logits.
        holds_logits: Whether those of all tokens exist at once: of a type that runs a row at a time.
        itemsize: Of a number in the dtype of the products.
        layers: Number of decoder layers from the first that trains on; those below keep nothing.
        saved: Bytes a token that one of these keeps for backward, its input included.
        mlp: Bytes of a token's state inside the MLP; backward has four such at a time.
        in_pieces: Whether a checkpointed layer has gate and up of :data:`PIECE_TOKENS` tokens at a time.
        dense: Bytes of the largest quantized weight, made dense for a product.
        gathered: Bytes of a sharded base that are whole for a moment: in a layer, in the head.
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
        """Return the bytes at the peak by part, for a micro-batch of so many computed tokens; they add up to it."""
        inputs, saved = float(tokens * self.hidden), tokens * self.saved
        kept = saved if not choice.checkpointed else 0 if choice.offload else inputs  # of a layer until backward
        # of the head: the last norm's input and its inverse norm in float32; a labelled state's gradient and index
        head = tokens * (self.hidden / self.itemsize * FLOAT + FLOAT + self.hidden + _INDEX)
        activations = head + self.layers * kept
        piece = min(tokens, PIECE_TOKENS) if choice.checkpointed and self.in_pieces else tokens
        in_layer = inputs + 4 * piece * self.mlp + self.dense  # the first of these for the output's gradient
        if choice.checkpointed:  # computes again what it did not keep
            in_layer += saved - 2 * (tokens - piece) * self.mlp - kept
        # the last norm's output, and its labelled states; logits of some tokens, and probabilities in float32
        rows = min(logits_chunk_size(self.logits // self.itemsize, self.itemsize, "cuda"), tokens)
        in_head = 2 * inputs + rows * self.logits * (1 + FLOAT / self.itemsize)
        if self.holds_logits:  # of each row, together, and their gradient
            in_head += 3 * tokens * self.logits
        gathered, workspace = max(zip(self.gathered, (in_layer, in_head), strict=True), key=sum)
        return {**self.fixed, "gathered": gathered, "activations": round(activations), "workspace": round(workspace)}

    def host_bytes(self, tokens: int, choice: Checkpointing) -> int:
        """Return the bytes in host memory: of a sharded base, and of the inputs of layers."""
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
    linears = [each for each in causal_lm.modules() if isinstance(each, bnb.nn.Linear4bit)]
    scales = sum(each.in_features * each.out_features for each in linears) // 64
    fixed["scales"] = scales * FLOAT
    # double quantized they are bytes, and a float32 for 256 of these; unnest_scales of load/base_model.py makes them
    # plain if a twentieth of the free memory holds what that takes, unless the base is sharded
    free = device_bytes - CONTEXT_BYTES - sum(fixed.values()) + 3 * scales  # as the base is loaded
    if double_quant and (sharded_offload is not None or 20 * 3 * scales > free):
        fixed["scales"] = scales + scales // 256 * FLOAT
    numbers = sum(each.numel() for each in trainable_tensors(model).values())
    fixed["adapters"] = FLOAT * numbers
    fixed["gradients"] = FLOAT * numbers * (2 if processes > 1 else 1)  # DDP has a copy
    fixed["optimizer"] = (2 if "8bit" in str(optimizer) else 2 * FLOAT) * numbers
    fixed["copies"] = dtype.itemsize * numbers if dtype.itemsize < FLOAT else 0
    fixed["context"] = CONTEXT_BYTES

    layers = decoder_layers(causal_lm)
    if not trainable_tensors(causal_lm.get_input_embeddings()):
        first = next((number for number, each in enumerate(layers) if trainable_tensors(each)), len(layers) - 1)
        layers = layers[first:]
    sizes = [linear_sizes(each) for each in layers[-1].modules() if isinstance(each, LINEARS)]
    is_quantized = bool(linears) or any(isinstance(each, bnb.nn.Linear8bitLt) for each in layers[-1].modules())
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

    FSDP2 gathers a layer into a buffer, and copies that to its parameters while the next one is on its way.
    """
    layers, ends = decoder_layers(causal_lm), [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    base, vocabulary = _frozen_bytes([causal_lm]) - _frozen_bytes(ends), _frozen_bytes(ends)
    if sharded_offload is None:
        return {"base": base, "vocabulary": vocabulary}, (0, 0), 0
    ends = ends if shards_vocabulary(causal_lm) else []
    in_layers, in_ends = _frozen_bytes(layers), _frozen_bytes(ends)
    largest, largest_end = (max((_frozen_bytes([each]) for each in modules), default=0) for modules in (layers, ends))
    held = {"base": base - in_layers, "vocabulary": vocabulary - in_ends}
    if sharded_offload:
        host_bytes = sum(_pinned_bytes(each.nbytes // processes) for each in _frozen([*layers, *ends]))
        return held, (2 * largest + largest // processes, 2 * largest_end), host_bytes
    held = {"base": held["base"] + in_layers // processes, "vocabulary": held["vocabulary"] + in_ends // processes}
    return held, (2 * largest, 2 * largest_end), 0


def _frozen(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    return {each for module in modules for each in module.parameters() if not each.requires_grad}


def _frozen_bytes(modules: Sequence[nn.Module]) -> int:
    return sum(each.nbytes for each in _frozen(modules))


def _pinned_bytes(size: int) -> int:
    """Return what a tensor takes in pinned host memory, which torch hands out in powers of two."""
    return 1 << max(0, size - 1).bit_length()
