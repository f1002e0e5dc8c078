"""The number that an answer ends in: GSM8K's ``#### 18``."""

import re
from decimal import Decimal

MARK = "####"
# A minus after a digit or a bracket subtracts, and is no sign.
_NUMBER = re.compile(r"(?:(?<![\d)])-\s?)?\$?\d[\d,]*(?:\.\d+)?")


def numeric_match(answer: str, expected: str) -> float:
    """Give 1 if answer and reference come to the same number; see :func:`find_number`."""
    number = find_number(answer)
    return float(number is not None and number == find_number(expected))


def find_number(text: str) -> Decimal | None:
    """Find the first number behind the last ``####``; without the mark, the last number of all.

    The second rule is for a base that was never told of the mark (lm-evaluation-harness calls it flexible extraction).
    Thousands' commas and a dollar sign are left out.
    """
    _, mark, after = text.rpartition(MARK)
    numbers = _NUMBER.findall(after)
    if not numbers:
        return None
    return Decimal(re.sub(r"[,$\s]", "", numbers[0] if mark else numbers[-1]))
