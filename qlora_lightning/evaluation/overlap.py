"""Scores of free text against a reference, by torchmetrics."""

from typing import Any


def rouge_l(answer: str, expected: str) -> float:
    """Give ROUGE-L's F1: of words, along the longest common subsequence (Lin 2004). Counts a-z and digits only."""
    from torchmetrics.functional.text import rouge_score

    return float(rouge_score(answer, expected, rouge_keys="rougeL")["rougeL_fmeasure"])


def chrf(answer: str, expected: str) -> float:
    """Give chrF++, between 0 and 1: F2 of n-grams of characters and words (Popović 2017). For any language."""
    from torchmetrics.functional.text import chrf_score

    score: Any = chrf_score([answer], [[expected]])
    return float(score)
