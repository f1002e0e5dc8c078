"""The shapes of micro-batches and decoder layers: all that the memory of a step depends on."""

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.adapters import trainable_tensors
from qlora_lightning.model.decoder_layer import FusedDecoderLayer
from qlora_lightning.model.linear import ADAPTER, FusedLinear, FusedLinear4bit, is_plain


@dataclass(frozen=True)
class BatchShape:
    """The shape of a micro-batch.

    Attributes:
        lengths: Tokens of each sample.
        labelled: Labelled tokens of all samples.
    """

    lengths: tuple[int, ...]
    labelled: int

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(self.lengths)


@dataclass(frozen=True)
class LinearShape:
    """A linear of a decoder layer.

    Attributes:
        inputs: Columns of the weight.
        outputs: Rows of the weight.
        rank: Of its adapter; 0 without one.
        dropout: Whether the adapter drops inputs.
        int8: Whether the weight is stored so, by bitsandbytes.
    """

    inputs: int
    outputs: int
    rank: int = 0
    dropout: bool = False
    int8: bool = False


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer.

    Attributes:
        linears: By their own names, ``q_proj`` to ``down_proj``.
        heads: Of queries.
        fused: Whether it runs in the functions of :mod:`qlora_lightning.model.decoder_layer`.
        input_trains: Whether something below it trains, so that gradients flow through all of it.
        checkpointed: Whether only its input is kept.
    """

    linears: dict[str, LinearShape]
    heads: int
    fused: bool = True
    input_trains: bool = True
    checkpointed: bool = False

    def rank_of(self, *names: str) -> int:
        """Add up the ranks of some linears."""
        return sum(self.linears[name].rank for name in names)

    @property
    def width(self) -> int:
        """Of the stream of hidden states."""
        return self.linears["q_proj"].inputs

    @property
    def inner_width(self) -> int:
        """Of gate and up."""
        return self.linears["gate_proj"].outputs

    @property
    def trains(self) -> bool:
        """Whether it or something below it trains."""
        return self.input_trains or self.rank_of(*self.linears) > 0


def read_layers(model: nn.Module, every_n_layers: int = 0, number_bytes: int = 2) -> list[LayerShape]:
    """Describe the decoder layers of a model with its adapters.

    Args:
        model: It may be on the meta device.
        every_n_layers: Every n-th layer is checkpointed, from the first; 0: none.
        number_bytes: Of a number in the dtype of the products: 16 bits are autocast where PEFT's own layers train.
    """
    plain = number_bytes < 4 and _has_unfused(model)
    causal_lm: Any = model
    input_trains = any(parameter.requires_grad for parameter in causal_lm.get_input_embeddings().parameters())
    found = []
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        linears = _linears_of(layer)
        usual = isinstance(layer, FusedDecoderLayer) and all(is_plain(linear) for linear in linears.values())
        shapes = {name: _read_linear(linear) for name, linear in linears.items()}
        heads = shapes["q_proj"].outputs // int(layer.self_attn.head_dim)
        checkpointed = every_n_layers > 0 and number % every_n_layers == 0
        found.append(LayerShape(shapes, heads, usual and not plain, input_trains, checkpointed))
        input_trains = input_trains or any(parameter.requires_grad for parameter in layer.parameters())
    return found


def _has_unfused(model: nn.Module) -> bool:
    """Whether something trains in a layer of PEFT's own, or beside the adapters; see ``assemble_model``."""
    beside = any(".lora_" not in name for name in trainable_tensors(model))
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return beside or not all(isinstance(layer, FusedLinear | FusedLinear4bit) for layer in layers)


def _linears_of(layer: nn.Module) -> dict[str, nn.Module]:
    return {name.rpartition(".")[2]: module for name, module in layer.named_modules() if name.endswith("_proj")}


def _read_linear(module: Any) -> LinearShape:
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    int8 = isinstance(base, bnb.nn.Linear8bitLt)
    if not isinstance(module, LoraLayer):
        return LinearShape(base.in_features, base.out_features, int8=int8)
    dropout = not isinstance(module.lora_dropout[ADAPTER], nn.Identity)
    return LinearShape(base.in_features, base.out_features, int(module.r[ADAPTER]), dropout, int8)
