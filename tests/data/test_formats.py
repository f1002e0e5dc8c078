from pathlib import Path

import pytest

from qlora_lightning.data.formats import choose_format
from qlora_lightning.data.reader import Row
from qlora_lightning.errors import UserError


def rows(*values):
    return [Row(value, "a.jsonl", line) for line, value in enumerate(values, start=1)]


def convert(values):
    return [(m["role"], m["content"]) for m in choose_format(rows(values), "auto").convert(values)]


def refusal(values, name="auto", **kwargs):
    with pytest.raises(UserError) as error:
        choose_format(rows(values), name, **kwargs)
    return str(error.value)


def test_alpaca_with_and_without_input_and_system():
    assert convert({"instruction": "Do", "input": "", "output": "Done"}) == [("user", "Do"), ("assistant", "Done")]
    assert convert({"instruction": "Do", "input": "x", "output": "Done", "system": "S"}) == [
        ("system", "S"),
        ("user", "Do\n\nx"),
        ("assistant", "Done"),
    ]


def test_messages_and_prompt_completion():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = [("user", "a"), ("assistant", "b")]
    assert convert({"messages": messages}) == expected
    assert convert({"prompt": "a", "completion": "b"}) == expected
    assert convert({"prompt": messages[:1], "completion": messages[1:]}) == expected


def test_prompt_and_completion_of_two_kinds_are_refused():
    with pytest.raises(UserError, match="two strings or two lists"):
        convert({"prompt": "a", "completion": []})


def test_alpaca_history_is_not_silently_dropped():
    with pytest.raises(UserError, match="'history' is not read"):
        convert({"instruction": "a", "output": "b", "history": [["c", "d"]]})


def test_rows_to_predict_may_lack_the_answer():
    assert choose_format(rows({"instruction": "a"}), "auto", needs_answer=False).name == "alpaca"
    both = {"prompt": "a", "messages": []}  # by all keys it is messages
    assert "fits more than one" not in choose_format(rows(both), "auto", needs_answer=False).name


def test_ambiguous_keys_name_both_formats():
    message = refusal({"instruction": "a", "output": "b", "prompt": "a", "completion": "b"})
    assert "a.jsonl:1 fits more than one format, alpaca and prompt_completion" in message


def test_unrecognised_keys_name_found_expected_and_nearest():
    message = refusal({"instuction": "a", "output": "b"})
    assert "by the keys instuction, output" in message
    assert "instruction + output (alpaca), messages (messages), prompt + completion (prompt_completion)" in message
    assert "Did you mean 'instruction' by 'instuction'?" in message


def test_an_unknown_name_suggests_the_nearest():
    assert "found 'alpacca'. Did you mean 'alpaca'?" in refusal({}, "alpacca")


def test_a_function_is_found_by_its_path_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows_of_mine.py").write_text("def convert(row):\n    return row['m']\nnumber = 3\n")
    form = choose_format(rows({"m": 5}), "rows_of_mine.convert")
    assert (form.name, form.convert({"m": 5})) == ("rows_of_mine.convert", 5)
    assert "has no 'convrt'; did you mean 'convert'?" in refusal({}, "rows_of_mine.convrt")
    assert "is int, not a function" in refusal({}, "rows_of_mine.number")
    assert "cannot import 'no_such_module'" in refusal({}, "no_such_module.convert")
