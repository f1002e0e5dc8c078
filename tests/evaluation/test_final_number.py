from decimal import Decimal

import pytest

from qlora_lightning.evaluation.final_number import find_number, numeric_match


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = $18\n#### 18", "18"),
        ("#### 3 then #### $1,234.50 of 7", "1234.50"),
        ("She makes 9 * 2 = $18 a day.", "18"),
        ("20-3", "3"),
        ("It falls to -4", "-4"),
        ("(5)-4", "4"),
        ("No number at all", None),
        ("5 apples #### none", None),
        ("", None),
    ],
)
def test_the_number_behind_the_mark_counts_and_without_a_mark_the_last(text, number):
    assert find_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value():
    assert numeric_match("#### 1,000.0", "#### 1000") == 1.0
    assert numeric_match("#### 1001", "#### 1000") == 0.0
    assert numeric_match("nothing", "#### 1000") == 0.0
