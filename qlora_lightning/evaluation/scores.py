"""Which scores there are, and which of them apply to given references."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qlora_lightning.evaluation.final_number import MARK, find_number, numeric_match
from qlora_lightning.evaluation.json_fields import json_f1, json_valid, parse_json
from qlora_lightning.evaluation.overlap import chrf, rouge_l
from qlora_lightning.support.errors import UserError


class Score(NamedTuple):
    """How an answer is judged.

    Attributes:
        judge: Maps answer and reference, both stripped, to a number from 0 to 1; 1 is best.
        applies: Whether a reference can be judged by.
        needs: What such a reference is, in words.
    """

    judge: Callable[[str, str], float]
    applies: Callable[[str], bool] = lambda reference: True
    needs: str = "any text"


@dataclass
class Judgement:
    """What one model makes of one row.

    Attributes:
        nll: Sum of the loss over its labelled tokens, in nats.
        labelled_tokens: How many they are.
        correct: Of how many the label was the most likely token.
        answer: What the model answers; ``None`` where it was not asked.
        answer_tokens: Of it.
        stopped: Whether it ended by a stop token.
        scores: By name.
    """

    nll: float
    labelled_tokens: int
    correct: int
    answer: str | None = None
    answer_tokens: int = 0
    stopped: bool = False
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Nats per labelled token; NaN where none is labelled."""
        return self.nll / self.labelled_tokens if self.labelled_tokens else math.nan


def exact_match(answer: str, expected: str) -> float:
    """Give 1 if the answer is the reference, letter by letter."""
    return float(answer == expected)


def _is_json(reference: str) -> bool:
    return parse_json(reference) is not None


def _has_number(reference: str) -> bool:
    return find_number(reference) is not None


SCORES: dict[str, Score] = {
    "exact_match": Score(exact_match),
    "json_valid": Score(json_valid, _is_json, "JSON objects or arrays"),
    "json_f1": Score(json_f1, _is_json, "JSON objects or arrays"),
    "numeric_match": Score(numeric_match, _has_number, f"answers with a number, such as `{MARK} 18`"),
    "rouge_l": Score(rouge_l),
    "chrf": Score(chrf),
}
_OF_JSON = ["exact_match", "json_valid", "json_f1"]
_OF_NUMBERS = ["numeric_match", "rouge_l"]
_OF_TEXT = ["exact_match", "rouge_l", "chrf"]


def check_scores(named: str | Sequence[str]) -> None:
    """Refuse a score that there is not.

    Raises:
        UserError: There is one among them.
    """
    unknown = [] if named == "auto" else [name for name in _as_list(named) if name not in SCORES]
    if unknown:
        raise UserError(f"There is no score {unknown[0]!r}: expected auto, or some of {', '.join(SCORES)}.")


def choose_scores(references: Sequence[str], named: str | Sequence[str] = "auto") -> list[str]:
    """Give the names of the scores that apply, the one that counts most first.

    Args:
        references: What the rows answer.
        named: Those that the user wants; ``auto``: JSON answers are judged as JSON, answers of which each has
            GSM8K's ``####`` by their number, other text letter by letter, by ROUGE-L and by chrF.

    Raises:
        UserError: A named score does not apply to a reference.
    """
    if named == "auto":
        if references and all(map(_is_json, references)):
            return list(_OF_JSON)
        return list(_OF_NUMBERS if references and all(MARK in text for text in references) else _OF_TEXT)
    check_scores(named)
    for name in _as_list(named):
        wrong = next((text for text in references if not SCORES[name].applies(text)), None)
        if wrong is not None:
            raise UserError(f"The score {name} needs {SCORES[name].needs}, but a row answers {wrong[:80]!r}.")
    return _as_list(named)


def describe_mixture(references: Sequence[str], named: str | Sequence[str] = "auto") -> str | None:
    """Say that answers of several kinds are all judged as text; ``None`` where they are of one, or the user chose."""
    kinds = {"JSON": sum(map(_is_json, references)), f"`{MARK}`": sum(MARK in text for text in references)}
    some = [f"{count:,} with {kind}" for kind, count in kinds.items() if 0 < count < len(references)]
    if named != "auto" or not some or len(references) in kinds.values():
        return None
    return (
        f"Of the {len(references):,} expected answers some are of a kind of their own ({', '.join(some)}): "
        "all are judged as text. A file of one kind, by `evaluate --data.val FILE`, is judged by the scores that fit "
        "it."
    )


def judge_answer(answer: str, expected: str, scores: Sequence[str]) -> dict[str, float]:
    """Judge an answer by some scores; space around it does not count."""
    return {name: SCORES[name].judge(answer.strip(), expected.strip()) for name in scores}


def _as_list(named: str | Sequence[str]) -> list[str]:
    return [part.strip() for part in named.split(",")] if isinstance(named, str) else list(named)
