"""Which modules carry an adapter: presets, names, regular expressions and layers, resolved to full module names."""

import difflib
import re
from collections.abc import Iterable

from torch import nn

from qlora_lightning.support.errors import UserError

PRESETS = {"all-linear": ".", "attention": ".self_attn.", "mlp": ".mlp."}  # what the names of their modules hold
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def resolve_targets(model: nn.Module, target_modules: str | list[str], layers: str | list[int] = "all") -> list[str]:
    """Name every module that shall carry an adapter, in the model's order.

    Args:
        model: The base, without adapters.
        target_modules: ``all-linear`` (every linear of the decoder layers), ``attention``, ``mlp``, a list of names
            (``q_proj``, or longer endings), or a regular expression that matches full names.
        layers: ``all``, ``last:N``, or a list of layer indices counted from 0.

    Raises:
        UserError: A name, the expression or the layers select nothing.
    """
    candidates = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    return select_targets(candidates, target_modules, layers)


def select_targets(candidates: list[str], target_modules: str | list[str], layers: str | list[int]) -> list[str]:
    """Do :func:`resolve_targets` with the names of all modules that could carry an adapter.

    Raises:
        UserError: As there.
    """
    selected = _select_modules(candidates, target_modules)
    chosen = _choose_layers(candidates, layers)
    targets = [name for name in selected if layer_of(name) is None or layer_of(name) in chosen]
    if not targets:
        raise UserError(
            f"model.target_modules {target_modules!r} and model.layers {layers!r} together select no module: "
            "the modules lie in other layers. Choose layers that hold them."
        )
    return targets


def check_layers(layers: str | list[int]) -> None:
    """Refuse what selects layers of no base; see :func:`resolve_targets`.

    Raises:
        UserError: A string is neither ``all`` nor ``last:N``.
    """
    if isinstance(layers, str) and not re.fullmatch(r"all|last:\d+", layers):
        raise UserError(f"model.layers is {layers!r}: expected all, last:N, or a list of layer indices.")


def compact_targets(model: nn.Module, targets: list[str]) -> list[str]:
    """Shorten full names to endings (``q_proj``) where these select the same modules: what other tools write and read.

    Args:
        model: The base, without adapters.
        targets: Full names, as :func:`resolve_targets` gives them.
    """
    endings = sorted({name.rpartition(".")[2] for name in targets})
    same = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return endings if same == set(targets) else targets


def _select_modules(candidates: list[str], target_modules: str | list[str]) -> list[str]:
    if isinstance(target_modules, str) and target_modules in PRESETS:
        part = PRESETS[target_modules]
        return [name for name in candidates if layer_of(name) is not None and part in name]
    if isinstance(target_modules, str):
        return _match_expression(candidates, target_modules)
    if not target_modules:
        raise UserError("model.target_modules is an empty list: name at least one module, or write all-linear.")
    for ending in target_modules:
        if not any(_ends_with(name, ending) for name in candidates):
            raise UserError(f"model.target_modules names {ending!r}, {_nothing_matches(candidates, ending)}")
    return [name for name in candidates if any(_ends_with(name, ending) for ending in target_modules)]


def _match_expression(candidates: list[str], expression: str) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"model.target_modules {expression!r} is not a regular expression: {error}.") from error
    selected = [name for name in candidates if pattern.fullmatch(name) or _ends_with(name, expression)]
    if not selected:
        raise UserError(
            f"model.target_modules is {expression!r}, {_nothing_matches(candidates, expression)} "
            f"Presets are {', '.join(PRESETS)}; an expression must match a full name such as {candidates[1]}."
        )
    return selected


def _nothing_matches(candidates: list[str], wanted: str) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))
    nearest = difflib.get_close_matches(wanted, [*endings, *PRESETS], n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"but the base has no such module; it has {', '.join(endings)}.{hint}"


def _choose_layers(candidates: Iterable[str], layers: str | list[int]) -> set[int]:
    check_layers(layers)
    count = 1 + max((index for name in candidates if (index := layer_of(name)) is not None), default=-1)
    if layers == "all":
        return set(range(count))
    if isinstance(layers, str):
        wanted = int(layers.removeprefix("last:"))
        if not 1 <= wanted <= count:
            raise UserError(f"model.layers is {layers!r}, but the base has {count} layers: N must lie in 1 … {count}.")
        return set(range(count - wanted, count))
    outside = [index for index in layers if not 0 <= index < count]
    if outside or not layers:
        raise UserError(
            f"model.layers is {layers}, but the base's layers are 0 … {count - 1}: name at least one of them."
        )
    return set(layers)


def layer_of(name: str) -> int | None:
    """Give the index of the decoder layer that a module lies in; ``None`` for one outside."""
    match = _LAYER.search(f".{name}")
    return int(match[1]) if match else None


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
