import pytest

from qlora_lightning.evaluation.names import describe_answered


@pytest.mark.parametrize(
    ("answered", "words"), [(0, ""), (1_000, ", 1,000 of them answered"), (1_001, ""), (1, ", 1 of them answered")]
)
def test_how_many_rows_were_answered_is_said_where_it_was_some(answered, words):
    assert describe_answered(answered, 1_001) == words
