"""What a sweep varies, one thing at a time: ranks, target modules, or learning rates."""

import argparse
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lightning.support.errors import UserError

DEFAULT_RANKS = "8,16,32,64"


@dataclass(frozen=True)
class Dimension:
    """One setting, and the values that are tried.

    Attributes:
        setting: Key under ``model``.
        title: Of its column, and of the plot's axis.
        values: In the order in which they are tried.
        stops: Whether the sweep ends where a value is not better than the one before it.
    """

    setting: str
    title: str
    values: tuple[Any, ...]
    stops: bool = False

    @property
    def folder(self) -> str:
        """Name of the sweep's folder inside the run folder."""
        return f"sweep-{self.setting.replace('_', '-')}"

    def place(self, value: Any) -> str:
        """Name a trial's folder inside the sweep's: ``rank-8``."""
        return re.sub(r"[^\w.+-]", "_", f"{self.setting.replace('_', '-')}-{show_value(value)}")

    def options(self, value: Any) -> list[str]:
        """Give the options of ``fit`` that a trial has beside the user's."""
        # The update is alpha / rank · B A x: with alpha = 2 × rank each rank acts as strongly.
        fixed = ["--model.alpha", "null"] if self.setting == "rank" else []
        return [f"--model.{self.setting}", show_value(value), *fixed]


def show_value(value: Any) -> str:
    """Write a value as the user would: ``2e-4`` and not ``0.0002``."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return str(value)


def add_dimension_options(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each dimension."""
    parser.add_argument("--ranks", metavar="N,N,…", help=f"ranks to try, rising (default: {DEFAULT_RANKS})")
    parser.add_argument("--target-modules", metavar="NAME,…", help="instead: what carries an adapter")
    parser.add_argument("--learning-rates", metavar="X,…", help="instead: learning rates to try")


def choose_dimension(own: argparse.Namespace) -> Dimension:
    """Turn the options into the one dimension that they ask for; ranks where they ask for none.

    Raises:
        UserError: They ask for several, or a value cannot be tried.
    """
    given = [name for name in ("ranks", "target_modules", "learning_rates") if getattr(own, name) is not None]
    if len(given) > 1:
        asked = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{asked}: a sweep varies one thing at a time. Fix the best of one, then sweep the other.")
    if given == ["target_modules"]:
        names = _split("--target-modules", own.target_modules, str, "attention,mlp,all-linear")
        return Dimension("target_modules", "target modules", names)
    if given == ["learning_rates"]:
        rates = _split("--learning-rates", own.learning_rates, float, "1e-4,2e-4,4e-4")
        _check(
            "--learning-rates", own.learning_rates, all(0 < rate < float("inf") for rate in rates), "positive numbers"
        )
        return Dimension("learning_rate", "learning rate", rates)
    text = DEFAULT_RANKS if own.ranks is None else own.ranks
    ranks = _split("--ranks", text, int, DEFAULT_RANKS)
    rise = ranks[0] > 0 and all(before < after for before, after in itertools.pairwise(ranks))
    _check("--ranks", text, rise, "positive integers that rise")
    return Dimension("rank", "rank", ranks, stops=True)


def refuse_ignored(dimension: Dimension, arguments: Sequence[str]) -> None:
    """Refuse on the command line what a sweep would drop: its own setting, and alpha where ranks are swept.

    Those of a config belong to that config's own training.

    Args:
        dimension: What is varied.
        arguments: Options of ``fit``.

    Raises:
        UserError: There is one.
    """
    for before, after in itertools.pairwise([*arguments, ""]):
        name, equals, value = before.partition("=")
        given = value if equals else after
        if name.endswith(f".{dimension.setting}"):
            raise UserError(
                f"{name} {given}: the sweep sets model.{dimension.setting} itself, to "
                f"{', '.join(map(show_value, dimension.values))}. Leave it out."
            )
        if dimension.setting == "rank" and name.endswith(".alpha") and given.lower() not in ("null", "~"):
            raise UserError(
                f"{name} {given}: in a sweep of ranks alpha follows the rank, 2 × rank, so that each acts as "
                "strongly. Leave it out, or sweep --target-modules or --learning-rates."
            )


def _split(option: str, text: str, kind: Callable[[str], Any], example: str) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} is {text!r}: expected values with commas between, such as {example}.") from error
    if len(values) < 2 or len(set(values)) < len(values) or "" in values:
        raise UserError(f"{option} is {text!r}: expected two values or more, each once, such as {example}.")
    return values


def _check(option: str, text: str, good: bool, words: str) -> None:
    if not good:
        raise UserError(f"{option} is {text!r}: expected {words}.")
