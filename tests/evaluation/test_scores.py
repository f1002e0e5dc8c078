"""Each score is the number worked out by hand, and the scores that apply are chosen by the references."""

import pytest

from qlora_lightning.evaluation.scores import (
    choose_scores,
    chrf,
    compute_score,
    find_scores,
    json_f1,
    json_valid,
    numeric_match,
    rouge_l,
)
from tests.errors import rejects


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("9 * 2 = $18\n#### 18", "18", 1.0),
        ("#### 3 then #### $1,234.50 of 7", "1234.50", 1.0),
        ("She makes 9 * 2 = $18 a day.", "18", 1.0),
        ("12 -5", "5", 1.0),
        ("(2 + 3) -5", "5", 1.0),
        ("The number is:\n- 18", "18", 1.0),
        ("covid-19", "19", 1.0),
        ("It costs .50 or so", "0.5", 1.0),
        ("1.5e3", "1500", 1.0),
        ("I get 1,8", "#### 18", 0.0),
        ("1,234,567", "1234567", 1.0),
        ("It is -18", "-18", 1.0),
        ("#### -$1,234.50", "-1234.5", 1.0),
        ("5 apples #### none", "5", 0.0),
        ("#### 1,000.0", "#### 1000", 1.0),
        ("nothing", "#### 1000", 0.0),
    ],
)
def test_the_number_behind_the_mark_counts_and_without_a_mark_the_last_by_value(answer, expected, score):
    assert numeric_match(answer, expected) == score


@pytest.mark.parametrize(
    "text", ['{"a": 1', "```json\n{}\n```", "{} and more", "3", '"text"', "", "[" * 100_000, '{"a": 2, "a": 1}']
)
def test_only_a_whole_object_or_array_is_json(text):
    assert json_valid(text, "{}") == json_f1(text, '{"a": 1}') == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 1.0),
        ('{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 0.5),  # 2 · 1 / (1 + 3)
        ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', 0.5),
        ('{"a": 1.0}', '{"a": 1}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a.b": 1}', '{"a": {"b": 1}}', 0.0),
        ("{}", "{}", 1.0),
    ],
)
def test_f1_counts_shared_leaves(answer, expected, f1):
    assert json_f1(answer, expected) == pytest.approx(f1)


def test_overlap_is_that_worked_out_by_hand():
    # common: the, sat = 2 of 3 words answered and of 4 words wanted
    assert rouge_l("The dog sat", "the cat sat down") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    # 1-grams of characters: 2 of 2 answered and 2 of 3 wanted; 2-grams: 1 of 1 and 1 of 2; longer ones, and words of
    # 1 and 2: none. The mean over 6 + 2 orders of F2 = 5 P R / (4 P + R).
    assert chrf("ab", "abc") == pytest.approx((5 * (2 / 3) / (4 + 2 / 3) + 5 * (1 / 2) / (4 + 1 / 2)) / 8)
    for score in (rouge_l, chrf):
        assert [score(text, "one two") for text in ("one two", "")] == pytest.approx([1.0, 0.0])
        assert score("Привет, мир", "Привет, мир") == pytest.approx(1.0)
    assert rouge_l("की", "का") == 0.0
    assert rouge_l("今天天气很好", "今天天气不错") == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (['{"a": 1}', "[1, 2]"], ["exact_match", "json_valid", "json_f1"]),
        (["So it is 3.\n#### 3", "#### 1,000"], ["numeric_match", "rouge_l"]),
        (["#### 3", "Hello.", "{}"], ["exact_match", "rouge_l", "chrf"]),
    ],
)
def test_scores_are_chosen_by_the_expected_answers(references, expected):
    assert list(choose_scores(references)) == expected


def half(answer, expected):
    return 0.5


def test_a_function_of_the_users_is_a_score_by_its_path_or_itself():
    assert [*find_scores("exact_match, tests.evaluation.test_scores.half")] == ["exact_match", "half"]
    assert find_scores([half]) == {"half": half}


@pytest.mark.parametrize(
    ("named", "fact"),
    [
        ("exact", "'exact'"),
        ("tests.evaluation.test_scores.halff", "halff"),
        ("tests.evaluation.test_scores", "expected auto"),
        ([half, half], "half"),
        ([lambda answer, expected: 2], "lambda"),
        ([lambda answer: 1.0], "(answer, expected)"),
        ([lambda answer, expected: 1 / 0], "division by zero"),
    ],
)
def test_what_is_no_score_is_rejected(named, fact):
    with rejects("evaluation.scores", fact):
        for name, score in find_scores(named).items():
            compute_score(name, score, "a", "a")
