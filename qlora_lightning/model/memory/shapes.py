"""The shape of a base with its adapters: all of it that the memory of a step depends on."""

import copy
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
from qlora_lightning.model.adapters.targets import PRESETS, layer_of
from qlora_lightning.model.layers.lora import FusedLinear, FusedLinear4bit, runs_fused


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
        fused: Whether it runs in the functions of :mod:`qlora_lightning.model.layers.decoder_layer`.
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


STORAGES = ("fp32", "bf16", "int8", "nf4", "nf4, double quantized")
_BLOCK, _OUTER_BLOCK = 64, 256  # numbers that share a scale, scales that share one in turn (QLoRA, section 3)


@dataclass(frozen=True)
class BaseShape:
    """What of a model is frozen.

    Attributes:
        weights: ``(out, in)`` of the linears in decoder layers: what is quantized.
        others: Numbers of embedding, norms, biases and head; a weight shared by embedding and head counts once.
        embedding: ``(rows, width)`` of an embedding that the head does not share, else ``(0, 0)``: of others.
    """

    weights: tuple[tuple[int, int], ...]
    others: int
    embedding: tuple[int, int] = (0, 0)

    @property
    def parameters(self) -> int:
        """How many numbers these are."""
        return self.others + sum(rows * columns for rows, columns in self.weights)

    def count_bytes(self, storage: str, other_bytes: int = 2) -> int:
        """Count the bytes.

        Args:
            storage: One of :data:`STORAGES`.
            other_bytes: Of a number that is not quantized; in fp32 all are of 4.
        """
        other_bytes = 4 if storage == "fp32" else other_bytes
        return self.others * other_bytes + sum(_weight_bytes(*shape, storage, other_bytes) for shape in self.weights)


def read_base(model: nn.Module) -> BaseShape:
    """Describe what of a model is frozen.

    Args:
        model: Base with or without adapters; it may be on the meta device.
    """
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layer_of(name) is not None and ".lora_" not in name
    ]
    frozen = [linear for linear in linears if not linear.weight.requires_grad]
    weights = {id(linear.weight) for linear in frozen}
    others = sum(p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in weights)
    shapes = tuple((linear.out_features, linear.in_features) for linear in frozen)
    return BaseShape(shapes, others, _shape_of_embedding(model))


def _shape_of_embedding(model: Any) -> tuple[int, int]:
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if weight is head or weight.requires_grad:
        return 0, 0
    rows, width = weight.shape
    return int(rows), int(width)


def name_storage(quantization: str, double_quant: bool, number_bytes: int) -> str:
    """Give the storage of a config's base; fp4 takes as much as nf4, fp16 as much as bf16.

    Args:
        quantization: As ``model.quantization`` has it.
        double_quant: As ``model.double_quant`` has it.
        number_bytes: Of a number in the dtype of the products, in which a base that is not quantized is held.
    """
    if quantization in ("nf4", "fp4"):
        return STORAGES[4] if double_quant else STORAGES[3]
    if quantization == "int8":
        return STORAGES[2]
    return STORAGES[0] if number_bytes > 2 else STORAGES[1]


def _weight_bytes(rows: int, columns: int, storage: str, other_bytes: int) -> int:
    """Count the bytes of one weight with its scales, but without the few hundred of its code table."""
    numbers = rows * columns
    if storage in ("fp32", "bf16"):
        return numbers * other_bytes
    if storage == "int8":
        return numbers + 4 * rows
    scales = math.ceil(numbers / _BLOCK)
    packed = math.ceil(numbers / 2)
    return packed + (4 * scales if storage == "nf4" else scales + 4 * math.ceil(scales / _OUTER_BLOCK))


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


def are_alike(config: Any, adapter: str | None, options: dict[str, Any]) -> bool:
    """Whether nothing that a config or its adapters say sets one decoder layer apart from another.

    Args:
        config: transformers' config of the base.
        adapter: Adapter folder to go on with, which may say anything.
        options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`.
    """
    targets = options.get("target_modules", "all-linear")
    # neither a regular expression nor a name with a layer in it, such as layers.3.q_proj
    by_name = targets in PRESETS if isinstance(targets, str) else not any("." in name for name in targets)
    plain = options.get("layers", "all") == "all" and not options.get("lora_options") and by_name
    differ = getattr(config, "layer_types", None) is not None or getattr(config, "is_heterogeneous", False)
    return plain and adapter is None and not differ


def shorten(config: Any, layers: int) -> Any:
    """Give the config of the same base with so many layers."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    return shorter


def deepen(one: ModelShape, two: ModelShape, layers: int) -> ModelShape:
    """Give the shape with many layers of a model whose layers are alike.

    Args:
        one: Its shape with one layer.
        two: Its shape with two: the second has something below it that may train.
        layers: How many there are to be.
    """
    more = layers - 1
    weights = two.base.weights[len(one.base.weights) :]
    others = two.base.others - one.base.others
    base = replace(one.base, weights=one.base.weights + weights * more, others=one.base.others + others * more)
    beside = Counter(one.beside)
    for shape, count in (Counter(two.beside) - Counter(one.beside)).items():
        beside[shape] += count * more
    all_layers = (two.layers[0], *[two.layers[1]] * more)
    return replace(two, layers=all_layers, beside=tuple(beside.elements()), base=base)
