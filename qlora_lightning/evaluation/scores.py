"""Scores of an answer beside its reference, and which of them apply to given references. Needs no torch."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

from qlora_lightning.support.errors import UserError

MARK = "####"  # before GSM8K's final number
# A minus after a digit or a bracket subtracts, and is no sign.
_NUMBER = re.compile(r"(?:(?<![\d)])-\s?)?\$?\d[\d,]*(?:\.\d+)?")
GENERAL = "general_loss"  # nats a token of text that has nothing to do with the task
_NAMES = {
    GENERAL: "loss on other text",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF++",
    "json_f1": "JSON field F1",
    "json_valid": "valid JSON",
}


def exact_match(answer: str, expected: str) -> float:
    """Return 1 if the answer is the reference, letter by letter."""
    return float(answer == expected)


def parse_json_answer(text: str) -> dict[str, Any] | list[Any] | None:
    """Parse an answer that is a JSON object or array and nothing else; ``None`` for any other."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a model that runs on may open brackets without end
        return None
    return value if isinstance(value, dict | list) else None


def json_valid(answer: str, expected: str) -> float:
    """Return 1 if the answer is a JSON object or array and nothing else."""
    return float(parse_json_answer(answer) is not None)


def json_f1(answer: str, expected: str) -> float:
    """Return the F1 of fields: of all leaves ``path: value``, those that answer and reference share.

    Order of keys does not count. An answer that is not JSON has no field right.
    """
    found, wanted = parse_json_answer(answer), parse_json_answer(expected)
    if found is None or wanted is None:
        return 0.0
    fields, reference = set(_leaves(found)), set(_leaves(wanted))
    return 2 * len(fields & reference) / (len(fields) + len(reference))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each leaf as its path and its value as JSON; an empty object or array is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        whole = isinstance(value, float) and value.is_integer()
        yield path, json.dumps(int(value) if whole else value)


def find_number(text: str) -> Decimal | None:
    """Return the first number behind the last ``####``; without the mark, the last number of all.

    The second rule is for a base that was never trained on the mark (lm-evaluation-harness: flexible extraction).
    Thousands' commas and a dollar sign are left out.
    """
    _, mark, after = text.rpartition(MARK)
    numbers = _NUMBER.findall(after)
    if not numbers:
        return None
    return Decimal(re.sub(r"[,$\s]", "", numbers[0] if mark else numbers[-1]))


def numeric_match(answer: str, expected: str) -> float:
    """Return 1 if answer and reference come to the same number; see :func:`find_number`."""
    number = find_number(answer)
    return float(number is not None and number == find_number(expected))


def rouge_l(answer: str, expected: str) -> float:
    """Return ROUGE-L's F1: of words of any alphabet, along the longest common subsequence (Lin 2004)."""
    from torchmetrics.functional.text import rouge_score

    found = rouge_score(answer, expected, normalizer=_split_words, rouge_keys="rougeL")
    return float(found["rougeL_fmeasure"])


def _split_words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower())


def chrf(answer: str, expected: str) -> float:
    """Return chrF++, from 0 to 1: F2 of n-grams of characters and words (Popović 2017). For any language."""
    from torchmetrics.functional.text import chrf_score

    score: Any = chrf_score([answer], [[expected]])
    return float(score)


SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "json_valid": json_valid,
    "json_f1": json_f1,
    "numeric_match": numeric_match,
    "rouge_l": rouge_l,
    "chrf": chrf,
}
"""Each maps an answer and the expected one, without space around them, to a number from 0 to 1; 1 is best."""


def check_scores(named: str | Sequence[str]) -> None:
    """Reject a name that is not a score's."""
    unknown = [] if named == "auto" else [name for name in _as_list(named) if name not in SCORES]
    if unknown:
        raise UserError(f"There is no score {unknown[0]!r}: expected auto, or some of {', '.join(SCORES)}.")


def choose_scores(references: Sequence[str], named: str | Sequence[str] = "auto") -> list[str]:
    """Return the names of the scores that apply, the most important one first.

    Args:
        references: The expected answers; one at least.
        named: Those that the user wants; ``auto``: JSON answers are scored as JSON, answers of which each has
            GSM8K's ``####`` by their number, other text and mixtures letter by letter, by ROUGE-L and by chrF.
    """
    if named != "auto":
        return _as_list(named)
    if all(parse_json_answer(text) is not None for text in references):
        return ["exact_match", "json_valid", "json_f1"]
    if all(MARK in text for text in references):
        return ["numeric_match", "rouge_l"]
    return ["exact_match", "rouge_l", "chrf"]


def is_share(metric: str) -> bool:
    """Whether a metric is between 0 and 1, and shown in percent."""
    return metric not in ("loss", "perplexity", GENERAL, "answer_tokens")


def describe_metric(metric: str) -> str:
    """Return a metric's name as people read it."""
    return _NAMES.get(metric, metric.replace("_", " "))


def describe_answered(answered: int, rows: int) -> str:
    """Return, to follow a number of rows, how many of them were answered; nothing if it was all of them, or none."""
    return f", {answered:,} of them answered" if 0 < answered < rows else ""


def _as_list(named: str | Sequence[str]) -> list[str]:
    return [part.strip() for part in named.split(",")] if isinstance(named, str) else list(named)
