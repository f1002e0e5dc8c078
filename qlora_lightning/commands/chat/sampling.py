"""How tokens of an answer are chosen."""

import contextlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from qlora_lightning.support.errors import UserError

_COLDEST, _HOTTEST = 1e-3, 1e3  # beyond, logits divided by it leave what float32 can say


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0.

    Attributes:
        temperature: Divides the logits.
        top_k: Sample from so many of the likeliest tokens; 0: from all.
        top_p: Sample from the likeliest tokens that make up this share.
        min_p: Sample from tokens at least this times as likely as the likeliest.
        repetition_penalty: Makes tokens that prompt and answer hold less likely; 1: does not.
        max_new_tokens: Where an answer is cut.
        stop: Texts at which an answer ends; they are not shown.
        seed: Of sampling; ``None``: another each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: A value is out of its range, or means nothing without a temperature.
        """
        warm = _COLDEST <= self.temperature <= _HOTTEST
        self._expect("temperature", self.temperature == 0 or warm, f"0 (greedy), or {_COLDEST:g} to {_HOTTEST:g}")
        self._expect("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._expect("top_p", 0 < self.top_p <= 1, "more than 0, at most 1")
        self._expect("min_p", 0 <= self.min_p < 1, "0 or more, less than 1")
        self._expect("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100 (1: none)")
        self._expect("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        self._expect("stop", all(self.stop), "a text that is not empty")
        self._expect("seed", self.seed is None or 0 <= self.seed < 2**64, "0 to 2^64 - 1")
        narrowed = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        if self.temperature == 0 and any(narrowed.values()):
            name = next(name for name, given in narrowed.items() if given)
            raise UserError(
                f"{_option(name)} chooses among samples, and without --temperature nothing is sampled: add one."
            )

    def _expect(self, name: str, holds: bool, words: str) -> None:
        if not holds:
            value = getattr(self, name)
            shown = f"{value:g}" if isinstance(value, float) else "empty" if isinstance(value, tuple) else value
            raise UserError(f"{_option(name)} is {shown}: expected {words}.")

    def changed(self, text: str) -> "Sampling":
        """Give it with one setting changed.

        Args:
            text: ``temperature 0.7`` or ``top-k 40``, as a user types it.

        Raises:
            UserError: There is no such setting, or it cannot have that value.
        """
        given, _, value = text.partition(" ")
        name = given.removeprefix("--").replace("-", "_")
        kinds: dict[str, Callable[[str], Any]] = {"stop": _read_stop, "seed": int}
        kinds |= {field.name: type(field.default) for field in fields(self) if field.name not in kinds}
        if name not in kinds:
            raise UserError(f"There is no setting {given!r}; there are {', '.join(setting_names())}.")
        try:
            parsed = kinds[name](value.strip())
        except (ValueError, OverflowError):
            expected = "a whole number" if kinds[name] is int else "a number"
            raise UserError(f"{given} is {value.strip()!r}: expected {expected}.") from None
        try:
            return replace(self, **{name: parsed})
        except UserError as error:  # told as it was typed, and not as an option
            raise UserError(re.sub(r"--(?=[a-z])", "", str(error))) from None

    def __str__(self) -> str:
        """Give the settings as a user types them."""
        shown = ((field.name.replace("_", "-"), getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name} {_write(value)}" for name, value in shown if value not in ((), None))


def setting_names() -> list[str]:
    """Name what can be set, as a user types it."""
    return [field.name.replace("_", "-") for field in fields(Sampling)]


def _read_stop(text: str) -> tuple[str, ...]:
    """Read a text as a shell would, quotes around it left out; what has a lone quote in it is taken as it is."""
    if not text:
        return ()
    if text[:1] in ("'", '"'):
        with contextlib.suppress(ValueError):
            text = " ".join(shlex.split(text))
    return (text,)


def _write(value: Any) -> str:
    return " ".join(json.dumps(text, ensure_ascii=False) for text in value) if isinstance(value, tuple) else str(value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
