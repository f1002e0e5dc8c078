"""Which modules carry an adapter: presets, names, regular expressions and layers, resolved to full module names."""

import re
from contextlib import suppress
from typing import Any

from torch import nn

from qlora_lightning.model.anatomy import LINEARS, decoder_layers, layer_of
from qlora_lightning.support.errors import UserError

_ATTENTION = re.compile(r"attn|attention")  # in the full name of a linear of attention, in any type
_PRESETS = ("all-linear", "attention", "mlp")  # the last is what is not attention
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba2")  # whose kernel reads the weight of out_proj, not its adapter


def resolve_targets(model: Any, target_modules: str | list[str], layers: str | list[int] = "all") -> list[str]:
    """Return the full name of every module that is to carry an adapter, in the model's order.

    Args:
        model: The base, without adapters.
        target_modules: ``all-linear`` (every linear of the decoder layers), ``attention``, ``mlp``, a list of names
            (``q_proj``, or longer endings), or a regular expression that matches full names.
        layers: ``all``, ``last:N``, or a list of layer indices counted from 0.
    """
    candidates = [name for name, module in model.named_modules() if isinstance(module, (*LINEARS, nn.Embedding))]
    in_layers = {module for layer in decoder_layers(model) for module in layer.modules()}
    names_in_layers = {name for name in candidates if model.get_submodule(name) in in_layers}
    if model.config.model_type in _MAMBA:
        names_in_layers = {name for name in names_in_layers if not name.endswith(".out_proj")}
    selected = _select_by_name(candidates, names_in_layers, target_modules)
    chosen_layers = {None, *_select_layers(candidates, layers)}  # None: modules outside of layers
    targets = [name for name in candidates if name in selected and layer_of(name) in chosen_layers]
    if not targets:
        raise UserError(f"model.target_modules {target_modules!r} has no module in model.layers {layers!r}.")
    return targets


def _select_by_name(candidates: list[str], in_layers: set[str], target_modules: str | list[str]) -> set[str]:
    if isinstance(target_modules, str) and target_modules in _PRESETS:
        attention = {name for name in in_layers if _ATTENTION.search(name)}
        return {"all-linear": in_layers, "attention": attention, "mlp": in_layers - attention}[target_modules]
    selected: set[str] = set()
    for ending in [target_modules] if isinstance(target_modules, str) else target_modules:
        matches = {name for name in candidates if f".{name}".endswith(f".{ending}")}
        if isinstance(target_modules, str):
            with suppress(re.error):  # it may be no expression: *proj
                matches |= {name for name in candidates if re.fullmatch(ending, name)}
        if not matches:
            names = dict.fromkeys([*_PRESETS, *(name.rpartition(".")[2] for name in candidates)])
            raise UserError(
                f"model.target_modules names {ending!r}, which the base does not have: expected {', '.join(names)}, "
                f"or an expression that matches a full name such as {candidates[1]}."
            )
        selected |= matches
    return selected


def _select_layers(candidates: list[str], layers: str | list[int]) -> list[int]:
    indices = sorted({layer for name in candidates if (layer := layer_of(name)) is not None})
    if layers == "all":
        return indices
    if isinstance(layers, str):
        last = re.fullmatch(r"last:([1-9]\d*)", layers)
        selected = list(range(indices[-1] + 1 - int(last[1]), indices[-1] + 1)) if last else []
    else:
        selected = layers
    if not selected or not set(selected) <= set(indices):
        expected = f"expected all, last:N, or a list of numbers from 0 to {indices[-1]}"
        raise UserError(f"model.layers is {layers!r}, but the base has {len(indices)} layers: {expected}.")
    return selected
