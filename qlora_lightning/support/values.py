"""Whether a value is of the kind that is expected.

The command line and a config are read by jsonargparse, which checks them by the type hints of the classes. In Python
nobody does, and a file of a folder may say anything: those values are checked here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from qlora_lightning.support.errors import UserError


def check_setting(key: str, value: object, is_valid: bool, expected: str) -> None:
    """Reject the value of a setting, by its YAML name, with what was expected."""
    if not is_valid:
        raise UserError(f"{key} is {value!r}: expected {expected}.", key)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, where a float may be whole and a bool is no number, or null or in a range."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, origin) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items()
        )
    if origin is Literal:
        return value in arguments
    if hint is None:
        return value is None
    if isinstance(value, bool) and (hint in (int, float) or isinstance(hint, range)):
        return False
    if isinstance(hint, range):
        return value is None or value in hint
    if hint is float:
        return isinstance(value, int | float) and abs(value) < 1e13  # no time or size is larger, and none is NaN
    return isinstance(value, hint)


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting takes: ``value in bounds``. NaN and a bool never are.

    Attributes:
        expected: What a message calls them.
        above: The value is larger.
        below: The value is smaller.
        minimum: The value is at least this.
        whole: The value is an integer.
        whole_from: It is one from here on.
        infinite: The value may be infinity too.
    """

    expected: str
    above: float = -math.inf
    below: float = math.inf
    minimum: float = -math.inf
    whole: bool = False
    whole_from: float = math.inf
    infinite: bool = False

    def __contains__(self, value: Any) -> bool:
        is_number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        is_number = is_number and (isinstance(value, Integral) or value < self.whole_from)
        is_within = is_number and bool(self.above < value < self.below and value >= self.minimum)
        return is_within or (self.infinite and value == math.inf)
