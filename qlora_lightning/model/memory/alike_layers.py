"""The shape of a deep model from those of shallow ones: where all decoder layers are alike, two tell of all.

PEFT takes 15 ms a layer to put adapters on (measured): half a second for 32 layers, to plan before anything is loaded.
"""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

from qlora_lightning.model.adapters.targets import PRESETS
from qlora_lightning.model.memory.model_shape import ModelShape


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
