"""Whether what a JSON file holds has the types that its reader counts on; files are edited, cut and mixed up."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Positive:
    """A number above zero, of that kind, up to ``most``."""

    kind: type
    most: int


Shape = type | str | Positive | dict[str, Any] | list[Any] | tuple[Any, ...] | None
"""What is expected of a value.

``str``, ``bool``, ``int`` (of 64 bits) or ``float`` (any finite number); ``Positive(int, 8)``, one from 1 to 8;
a string, which is the one allowed value; ``{key: shape}``, an object whose keys may be missing, ``"key!"`` one that
must be there, ``"*"`` and ``"*!"`` all the others; ``[shape]``, a list; ``(shape, …)``, one of several; ``None``,
anything. Null counts as missing.
"""
_WORDS: dict[type, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}


def find_fault(value: Any, shape: Shape, place: str = "") -> str | None:
    """Say what is wrong with a value, in words; ``None`` where nothing is.

    Args:
        value: As ``json.loads`` gives it.
        shape: What is expected.
        place: Its name, such as ``adapter.rank``.
    """
    if shape is None or value is None:
        return None
    if isinstance(shape, tuple):
        faults = [find_fault(value, each, place) for each in shape]
        deeper = (
            fault
            for each, fault in zip(shape, faults, strict=True)
            if isinstance(value, dict | list) and type(each) is type(value)
        )
        return None if None in faults else next(deeper, _word(value, shape, place))
    if isinstance(shape, dict) and isinstance(value, Mapping):
        return _find_in_object(value, shape, place)
    if isinstance(shape, list) and isinstance(value, list):
        places = [f"{place}[{number}]" for number in range(len(value))]
        found = (
            f"{at} is missing" if each is None else find_fault(each, shape[0], at)
            for at, each in zip(places, value, strict=True)
        )
        return next(filter(None, found), None)
    return None if _fits(value, shape) else _word(value, shape, place)


def _find_in_object(value: Mapping[str, Any], shape: dict[str, Any], place: str) -> str | None:
    inside = f"{place}." if place else ""
    needed = [key.removesuffix("!") for key in shape if key.endswith("!")]
    if "*!" in shape:
        needed = [*needed[:-1], *(key for key in value if key not in shape)]
    missing = [key for key in needed if value.get(key) is None]
    if missing:
        return f"{inside}{missing[0]} is missing"
    others = shape.get("*!", shape.get("*"))
    for key, each in value.items():
        fault = find_fault(each, shape.get(key, shape.get(f"{key}!", others)), f"{inside}{key}")
        if fault:
            return fault
    return None


def _fits(value: Any, shape: Shape) -> bool:
    if isinstance(shape, Positive):
        return _fits(value, shape.kind) and 0 < value <= shape.most
    if isinstance(shape, str):
        return bool(value == shape)
    if shape is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return math.isfinite(float(value))
        except OverflowError:  # whole numbers of JSON have no end
            return False
    if shape is int and isinstance(value, int) and abs(value) >= 2**63:
        return False
    return isinstance(shape, type) and isinstance(value, shape) and isinstance(value, bool) == (shape is bool)


def _word(value: Any, shape: Shape, place: str) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list"}
    found = kinds.get(type(value)) or json.dumps(value, ensure_ascii=False)
    return f"{place or 'it'} is {found if len(found) <= 40 else f'{found[:39]}…'}, expected {_word_shape(shape)}"


def _word_shape(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_word_shape(each) for each in shape)
    if isinstance(shape, Positive):
        return f"a positive {'whole ' if shape.kind is int else ''}number up to {shape.most:,}"
    if isinstance(shape, type):
        return _WORDS[shape]
    return shape if isinstance(shape, str) else "an object" if isinstance(shape, dict) else "a list"
