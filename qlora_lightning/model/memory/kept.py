"""What a training step needs beside weights, in bytes: by what each function keeps and makes.

The one place to adapt when a function of :mod:`qlora_lightning.model.layers.decoder_layer` keeps more or less than
before. ``t`` are the tokens of a micro-batch that are computed, ``e`` the bytes of a number in the dtype of the
products.
"""

from collections.abc import Sequence

import torch

from qlora_lightning.model.batch import BatchShape
from qlora_lightning.model.kernels.attention import attends_in
from qlora_lightning.model.layers.lora import TILE_BYTES
from qlora_lightning.model.loss import rows_of_logits, rows_of_probabilities
from qlora_lightning.model.memory.shapes import LayerShape, LinearShape

_FLOAT, _INDEX = 4, 8  # bytes of a float32, of a position


def kept_by_layers(layers: Sequence[LayerShape], batch: BatchShape, e: int, device: str) -> int:
    """Count what the decoder layers keep from forward until backward.

    Of checkpointed ones their inputs, and the product with the A of the last linear.
    """
    return sum(
        batch.computed * (layer.width + layer.fused * layer.rank_of("down_proj")) * e
        if layer.checkpointed
        else kept_by_layer(layer, batch, e, device)
        for layer in layers
    )


def kept_by_layer(layer: LayerShape, batch: BatchShape, e: int, device: str) -> int:
    """Count what one layer keeps; nothing where neither it nor what lies below it trains."""
    kept = _kept_fused if layer.fused else _kept_plain
    return kept(layer, batch, e, device)


def kept_outside(layers: Sequence[LayerShape], batch: BatchShape, e: int) -> int:
    """Count what the last norm, in float32, the angles of rotary embedding and the loss keep."""
    width, head_width = layers[0].width, layers[0].linears["q_proj"].outputs // layers[0].heads
    norm = batch.computed * (width * _FLOAT + _FLOAT)
    angles = 2 * batch.computed * head_width * e if any(not each.checkpointed and each.trains for each in layers) else 0
    return norm + angles + batch.labelled * (width * e + _INDEX)


def room_of_logits(batch: BatchShape, vocabulary: int, e: int, device: str) -> int:
    """Count the logits that are there at a time."""
    return min(rows_of_logits(vocabulary, e, device), batch.labelled) * vocabulary * e


def room_of_loss(layers: Sequence[LayerShape], batch: BatchShape, vocabulary: int, e: int, device: str) -> int:
    """Count what the loss makes and drops beside logits: hidden states, some rows' probabilities."""
    rows = rows_of_probabilities(vocabulary, e, device)
    copies = 2 if device == "cpu" else 1  # softmax turns logits to float32 first
    probabilities = copies * min(rows, batch.labelled) * vocabulary * _FLOAT
    return (batch.computed + batch.labelled) * layers[0].width * e + probabilities


def room_of_backward(layers: Sequence[LayerShape], batch: BatchShape, e: int, device: str) -> int:
    """Count the most that backward makes and drops in a layer, beyond what the model keeps.

    A checkpointed layer makes all that it would have kept again.
    """
    return max(_room_of_layer(layer, batch, e, device) for layer in layers)


def _room_of_layer(layer: LayerShape, batch: BatchShape, e: int, device: str) -> int:
    if not layer.trains:
        return _room_of_forward(layer, batch, e, device)
    t, wide = batch.computed, layer.inner_width
    again = kept_by_layer(layer, batch, e, device) if layer.checkpointed else 0
    stream, of_hidden = t * layer.width * e, t * wide * e
    moments = (
        # LoRAProjection: its weight, and the gradient of its input; then SwiGLU: silu(gate) and its product with up too
        of_hidden + _dense(layer.linears["down_proj"], e, device),
        3 * of_hidden,
        # NormedLinears behind it, when gate and up are gone and their gradients there: a weight, the norm's input in
        # float32 and rounded, its gradient
        _dense(layer.linears["gate_proj"], e, device) + t * layer.width * _FLOAT + 3 * stream,
        _room_of_attention(layer, batch, e, device),
    )
    return again + stream + max(moments)


def _room_of_attention(layer: LayerShape, batch: BatchShape, e: int, device: str) -> int:
    """Count the gradients of queries, keys and values; of what samples share, their parts in float32."""
    queries, keys_and_values = layer.linears["q_proj"].outputs, 2 * layer.linears["k_proj"].outputs
    parts = sum(batch.attended) * keys_and_values * _FLOAT if _looks_up(e, device) and any(batch.shared) else 0
    return batch.computed * (queries + keys_and_values) * e + parts


def _room_of_forward(layer: LayerShape, batch: BatchShape, e: int, device: str) -> int:
    return 3 * batch.computed * layer.inner_width * e + _dense(layer.linears["down_proj"], e, device)


def holes_of_checkpoints(layers: Sequence[LayerShape], e: int) -> int:
    """Count what a CPU's heap cannot use again: for each checkpointed layer, one dense weight fits nowhere.

    What stays of the layer until backward, small as it is, lands where such a weight has been. Measured on SmolLM2 in
    fp32: 110 MB after 4 steps, 140 after 40, where this gives 106.
    """
    run_again = (layer for layer in layers if layer.checkpointed)
    return sum(max(_dense(each, e, "cpu") for each in layer.linears.values()) for layer in run_again)


def _dense(linear: LinearShape, e: int, device: str) -> int:
    """Count what is made of a quantized weight for a product; a CPU makes a large one in parts."""
    whole = linear.inputs * linear.outputs * e
    return min(whole, TILE_BYTES) if device == "cpu" else whole


# ---- by function ----------------------------------------------------------------------------------------------------


def _kept_fused(layer: LayerShape, batch: BatchShape, e: int, device: str) -> int:
    t, flows, kept = batch.computed, layer.input_trains, 0
    norm = t * (layer.width * e + _FLOAT)  # NormedLinears: its input and the inverse root mean squares

    rank = layer.rank_of("q_proj", "k_proj", "v_proj")
    flows = flows or rank > 0
    kept += flows * (norm + t * rank * e)
    kept += flows * _kept_by_attention(layer, batch, e, device)

    rank = layer.rank_of("o_proj")  # LoRALinearFunction: nothing without an adapter
    flows = flows or rank > 0
    kept += (rank > 0) * t * (layer.linears["o_proj"].inputs + rank) * e

    rank = layer.rank_of("gate_proj", "up_proj")
    flows = flows or rank > 0
    kept += flows * (norm + t * rank * e)

    rank = layer.rank_of("down_proj")
    flows = flows or rank > 0
    return (
        kept + flows * t * (2 * layer.inner_width + rank) * e
    )  # SwiGLU: gate and up; LoRAProjection: the product with A


def _kept_by_attention(layer: LayerShape, batch: BatchShape, e: int, device: str) -> int:
    queries, keys_and_values = layer.linears["q_proj"].outputs, 2 * layer.linears["k_proj"].outputs
    if _looks_up(e, device):  # SampleAttention: they, and a normalizer for each row
        return batch.computed * ((queries + keys_and_values) * e + layer.heads * _FLOAT)
    # torch's kernels: of all tokens, and the output too
    return sum(batch.attended) * ((2 * queries + keys_and_values) * e + layer.heads * _FLOAT)


def _looks_up(e: int, device: str) -> bool:
    """Whether attention finds what samples share in the stream; else all of them are laid out whole."""
    return device == "cpu" and attends_in(torch.float32 if e == _FLOAT else torch.bfloat16)


def _kept_plain(layer: LayerShape, batch: BatchShape, e: int, device: str) -> int:
    """Count what the layer of transformers with PEFT's linears keeps, roughly."""
    if not layer.trains:
        return 0
    t = batch.computed
    norms = 2 * t * (layer.width * _FLOAT + _FLOAT)  # their input in float32
    normed = 5 * t * layer.width * e  # cast for each linear that reads it
    queries = layer.linears["q_proj"].outputs
    attention = t * (sum(layer.linears[name].outputs for name in ("q_proj", "k_proj", "v_proj")) + 2 * queries) * e
    swiglu = 4 * t * layer.inner_width * e  # gate, silu(gate), up, and their product
    adapted = [linear for linear in layer.linears.values() if linear.rank]
    adapters = sum(t * linear.rank * e + linear.dropout * t * linear.inputs * (e + 1) for linear in adapted)
    int8 = sum(t * linear.inputs for linear in layer.linears.values() if linear.int8)  # inputs in 8 bits
    return norms + normed + attention + swiglu + adapters + int8
