import pytest

from qlora_lightning.evaluation.json_fields import json_f1, json_valid, parse_json


@pytest.mark.parametrize("text", ['{"a": 1', "```json\n{}\n```", "{} and more", "3", '"text"', "NaN", "[NaN]", ""])
def test_only_a_whole_object_or_array_is_json(text):
    assert parse_json(text) is None
    assert json_valid(text, "{}") == 0.0


def test_brackets_without_end_are_no_json():
    assert json_valid("[" * 100_000, "{}") == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1.0),
        ('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
        ('{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 0.5),  # 2 · 1 / (1 + 3)
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0.5),
        ('{"a": 1.0}', '{"a": 1}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('{"a.b": 1}', '{"a": {"b": 1}}', 0.0),
        ("{}", "{}", 1.0),
        ("no", '{"a": 1}', 0.0),
    ],
)
def test_f1_counts_shared_leaves(answer, expected, f1):
    assert json_f1(answer, expected) == pytest.approx(f1)
