"""Scores of an answer against its reference, and which of them apply to given references. Needs no torch."""

import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any
from unicodedata import category, east_asian_width

from qlora_lightning.support.errors import UserError, explaining
from qlora_lightning.support.files import load_json

MARK = "####"  # before GSM8K's final number
# A dash is a sign only directly before the number: "- 18" is an item of a list, "12 -5" and "x-5" are subtractions.
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?<![\d)] )-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+\b)?"
)
FORGETTING = "forgetting_loss"  # nats per token, of text that has nothing to do with the task
_NAMES = {
    FORGETTING: "loss on other text",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF++",
    "json_f1": "JSON field F1",
    "json_valid": "valid JSON",
}
_TAKEN = {"loss", "perplexity", "token_accuracy", "stop_rate", "answer_tokens", FORGETTING}  # other metrics


def exact_match(answer: str, expected: str) -> float:
    """Return 1 if the answer equals the reference, character by character."""
    return float(answer == expected)


def parse_json_answer(text: str) -> dict[str, Any] | list[Any] | None:
    """Parse an answer that is a JSON object or array and nothing else; ``None`` for any other.

    One that has a key twice is none: readers of JSON do not agree which of them counts.
    """
    try:
        value = load_json(text)
    except ValueError:  # a model that does not stop may open many brackets
        return None
    return value if isinstance(value, dict | list) else None


def json_valid(answer: str, expected: str) -> float:
    """Return 1 if the answer is a JSON object or array and nothing else."""
    return float(parse_json_answer(answer) is not None)


def json_f1(answer: str, expected: str) -> float:
    """Return the F1 of fields: the leaves ``path: value`` that answer and reference share.

    The order of keys does not matter. An answer that is not JSON scores 0.
    """
    value, reference = parse_json_answer(answer), parse_json_answer(expected)
    if value is None or reference is None:
        return 0.0
    fields, reference_fields = set(_leaves(value)), set(_leaves(reference))
    return 2 * len(fields & reference_fields) / (len(fields) + len(reference_fields))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each leaf as its path and its value as JSON; an empty object or array is a leaf."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from _leaves(child, f"{path}[{index}]")
    else:
        is_whole = isinstance(value, float) and value.is_integer()
        yield path, json.dumps(int(value) if is_whole else value)


def find_number(text: str) -> Decimal | None:
    """Return the first number after the last ``####``; without the mark, the last number of the text.

    The second rule is for a base that was never trained on the mark (lm-evaluation-harness: flexible extraction).
    Thousands' commas and a dollar sign are dropped.
    """
    _, mark, tail = text.replace("\N{MINUS SIGN}", "-").rpartition(MARK)
    numbers = _NUMBER.findall(tail)
    if not numbers:
        return None
    return Decimal(re.sub(r"[,$]", "", numbers[0] if mark else numbers[-1]))


def numeric_match(answer: str, expected: str) -> float:
    """Return 1 if answer and reference have the same number; see :func:`find_number`."""
    number = find_number(answer)
    return float(number is not None and number == find_number(expected))


def rouge_l(answer: str, expected: str) -> float:
    """Return ROUGE-L's F1 of words, of any alphabet: by the longest common subsequence (Lin 2004)."""
    from torchmetrics.functional.text import rouge_score

    rouge = rouge_score(answer, expected, normalizer=_split_words, rouge_keys="rougeL")
    return float(rouge["rougeL_fmeasure"])


def _split_words(text: str) -> str:
    # letters, the marks on them, and numbers; Chinese and Japanese have no spaces, and each character is a word
    words = (f" {char} " if east_asian_width(char) in "WF" else char for char in text.lower())
    return "".join(char if category(char)[0] in "LMN" else " " for char in "".join(words))


def chrf(answer: str, expected: str) -> float:
    """Return chrF++, from 0 to 1: F2 of n-grams of characters and words (Popović 2017). For any language."""
    from torchmetrics.functional.text import chrf_score

    score: Any = chrf_score([answer], [[expected]])
    return float(score)


Score = Callable[[str, str], float]
SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "json_valid": json_valid,
    "json_f1": json_f1,
    "numeric_match": numeric_match,
    "rouge_l": rouge_l,
    "chrf": chrf,
}
"""Each maps an answer and its reference, stripped of surrounding space, to a number from 0 to 1; 1 is best."""


def find_scores(named: str | Score | Sequence[str | Score]) -> dict[str, Score]:
    """Return scores by their names; a function of the user's has its own, and may be given by its dotted path.

    Raises:
        UserError: There is no such score, it cannot be imported, or its name is taken.
    """
    scores: dict[str, Score] = {}
    for each in _as_list(named):
        score: Any = SCORES.get(each) if isinstance(each, str) else each
        if score is None and isinstance(each, str) and "." in each:
            with explaining(f"evaluation.scores: cannot import {each!r}", "evaluation.scores"):
                score = pkgutil.resolve_name(each)
        if not callable(score):
            expected = (
                f"auto, some of {', '.join(SCORES)}, or a function (answer, expected) -> number by its dotted path"
            )
            raise UserError(f"There is no score {each!r}: expected {expected}.", "evaluation.scores")
        name = each if isinstance(each, str) and each in SCORES else getattr(score, "__name__", type(score).__name__)
        if name in scores or name in _TAKEN or (name in SCORES and SCORES[name] is not score):
            raise UserError(f"A score is named {name}, as another metric: rename the function.", "evaluation.scores")
        scores[name] = score
    return scores


def choose_scores(references: Sequence[str], named: str | Score | Sequence[str | Score] = "auto") -> dict[str, Score]:
    """Return the scores that apply, by name, the most important one first.

    Args:
        references: The expected answers; at least one.
        named: The user's choice; ``auto``: JSON answers are scored as JSON, answers that all have GSM8K's ``####`` by
            their number, other text and mixtures by exact match, ROUGE-L and chrF.
    """
    if named != "auto":
        return find_scores(named)
    if all(parse_json_answer(text) is not None for text in references):
        return find_scores(["exact_match", "json_valid", "json_f1"])
    if all(MARK in text for text in references):
        return find_scores(["numeric_match", "rouge_l"])
    return find_scores(["exact_match", "rouge_l", "chrf"])


def compute_score(name: str, score: Score, answer: str, expected: str) -> float:
    """Score an answer; raise UserError if that is no number from 0 to 1."""
    value: Any = score(answer, expected)
    value = value.item() if hasattr(value, "item") else value  # of torch or NumPy
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise UserError(f"The score {name} returned {value!r}: expected a number from 0 to 1.", "evaluation.scores")
    return float(value)


def is_share(metric: str) -> bool:
    """Whether a metric is between 0 and 1 and shown in percent."""
    return metric not in ("loss", "perplexity", FORGETTING, "answer_tokens")


def describe_metric(metric: str) -> str:
    """Return a metric's name as people read it."""
    return _NAMES.get(metric, metric.replace("_", " "))


def describe_answered(answered: int, rows: int) -> str:
    """Describe how many of some rows were answered, to follow their number; nothing if it was all of them, or none."""
    return f", {answered:,} of them answered" if 0 < answered < rows else ""


def shorten_text(text: str, limit: int, from_end: bool = False) -> str:
    """Return the first characters of a text, or with ``from_end`` the last ones; ``(empty)`` for none."""
    if len(text) <= limit:
        return text or "(empty)"
    return f"… {text[-limit:]}" if from_end else f"{text[:limit]} …"


def _as_list(names: str | Score | Sequence[str | Score]) -> list[str | Score]:
    if callable(names):
        return [names]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
