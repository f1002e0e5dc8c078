import pytest

from qlora_lightning.data.rows.bad_rows import RowFault, check_characters, read_string


@pytest.mark.parametrize("value", ["", "plain", "é 😀 \u2028", {"a": ["b", 1, None, {"é": "x"}]}])
def test_ordinary_text_passes(value):
    check_characters(value, "it")


@pytest.mark.parametrize("place", [lambda text: text, lambda text: {"k": [text]}, lambda text: {text: 1}])
def test_nul_and_half_a_character_are_refused_wherever_they_lie(place):
    with pytest.raises(RowFault, match=r"^message 2 contains a NUL character$"):
        check_characters(place("a\x00b"), "message 2")
    with pytest.raises(RowFault, match=r"^message 2 contains half a character \(a lone surrogate, as a cut \\ud83d"):
        check_characters(place("a\ud83d"), "message 2")


def test_a_hundred_levels_pass_and_one_more_is_refused():
    value = "x"
    for _ in range(100):
        value = [value]
    check_characters(value, "it")
    with pytest.raises(RowFault, match="it is nested more than 100 levels deep"):
        check_characters([value], "it")


def test_a_string_is_returned_and_anything_else_named():
    assert read_string("x", "'input'") == "x"
    with pytest.raises(RowFault, match=r"^'input' must be a string, found null$"):
        read_string(None, "'input'")
    with pytest.raises(RowFault, match=r"^'input' contains a NUL character$"):
        read_string("\x00", "'input'")
