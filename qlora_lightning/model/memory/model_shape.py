"""The shape of a base with its adapters: all of it that the memory of a step depends on."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.adapters.lora import ADAPTER, trainable_tensors
from qlora_lightning.model.layers.linear import FusedLinear, FusedLinear4bit
from qlora_lightning.model.layers.plain_path import runs_fused
from qlora_lightning.model.memory.layer_shapes import LayerShape, LinearShape
from qlora_lightning.model.memory.stored_bytes import BaseShape, read_base


@dataclass(frozen=True)
class ModelShape:
    """A base with its adapters.

    Attributes:
        layers: Its decoder layers.
        beside: Shapes of what trains beside A and B of their linears.
        vocabulary: Rows of the head.
        base: What is frozen.
    """

    layers: tuple[LayerShape, ...]
    beside: tuple[tuple[int, ...], ...]
    vocabulary: int
    base: BaseShape

    def trained(self) -> Counter[tuple[int, ...]]:
        """Count the tensors that train by their shape."""
        return Counter([*self._adapters(), *self.beside])

    def count_trained(self) -> int:
        """Count the numbers that train."""
        return sum(count * math.prod(shape) for shape, count in self.trained().items())

    def _adapters(self) -> Iterator[tuple[int, ...]]:
        for layer in self.layers:
            for linear in layer.linears.values():
                if linear.rank:
                    yield linear.rank, linear.inputs
                    yield linear.outputs, linear.rank


def read_model(model: nn.Module, number_bytes: int = 2) -> ModelShape:
    """Describe a model with its adapters.

    Args:
        model: It may be on the meta device.
        number_bytes: Of a number in the dtype of the products: 16 bits are autocast where PEFT's own layers train.
    """
    causal_lm: Any = model
    layers = _read_layers(model, number_bytes)
    trained = Counter(tuple(parameter.shape) for parameter in trainable_tensors(model).values())
    vocabulary = int(causal_lm.get_output_embeddings().weight.shape[0])
    alone = ModelShape(tuple(layers), (), vocabulary, read_base(model))
    return replace(alone, beside=tuple((trained - alone.trained()).elements()))


def checkpoint_layers(model: ModelShape, every_n_layers: int) -> ModelShape:
    """Checkpoint every n-th layer, from the first, as transformers does; 0: none."""
    layers = [
        replace(layer, checkpointed=every_n_layers > 0 and number % every_n_layers == 0)
        for number, layer in enumerate(model.layers)
    ]
    return replace(model, layers=tuple(layers))


def _read_layers(model: nn.Module, number_bytes: int) -> list[LayerShape]:
    plain = number_bytes < 4 and _has_unfused(model)
    causal_lm: Any = model
    input_trains = any(parameter.requires_grad for parameter in causal_lm.get_input_embeddings().parameters())
    found = []
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        linears = _linears_of(layer)
        shapes = {name: _read_linear(linear) for name, linear in linears.items()}
        heads = shapes["q_proj"].outputs // int(layer.self_attn.head_dim)
        found.append(LayerShape(shapes, heads, runs_fused(layer) and not plain, input_trains))
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
