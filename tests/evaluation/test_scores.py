import pytest

from qlora_lightning.evaluation.scores import check_scores, choose_scores, describe_mixture, judge_answer
from qlora_lightning.support.errors import UserError


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (['{"a": 1}', "[1, 2]"], ["exact_match", "json_valid", "json_f1"]),
        (["So it is 3.\n#### 3", "#### 1,000"], ["numeric_match", "rouge_l"]),
        (['{"a": 1}', "Hello."], ["exact_match", "rouge_l", "chrf"]),
        (["42"], ["exact_match", "rouge_l", "chrf"]),
        ([], ["exact_match", "rouge_l", "chrf"]),
    ],
)
def test_scores_are_chosen_by_the_references(references, expected):
    assert choose_scores(references) == expected


@pytest.mark.parametrize(
    ("references", "named", "told"),
    [
        (
            ["#### 3", "Hello.", "{}"],
            "auto",
            "some are of a kind of their own (1 with JSON, 1 with `####`)",
        ),
        (["#### 3", "Hello."], "exact_match", None),
        (["#### 3", "#### 4"], "auto", None),
        (['{"a": "#### 3"}', "{}"], "auto", None),
        (["Hello."], "auto", None),
        ([], "auto", None),
    ],
)
def test_answers_of_several_kinds_are_told(references, named, told):
    said = describe_mixture(references, named)
    assert said is told or told in said


def test_named_scores_are_taken_as_they_are():
    assert choose_scores(["a"], ["chrf", "exact_match"]) == ["chrf", "exact_match"]
    assert choose_scores(["a"], "chrf, exact_match") == ["chrf", "exact_match"]


def test_a_score_that_does_not_apply_is_refused_with_the_reference():
    with pytest.raises(UserError, match="json_f1 needs JSON objects or arrays, but a row answers 'Hello"):
        choose_scores(['{"a": 1}', "Hello."], ["json_f1"])


def test_an_unknown_score_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match="no score 'bleu': expected auto, or some of exact_match, json_valid"):
        check_scores(["exact_match", "bleu"])


def test_space_around_an_answer_does_not_count_and_letters_do():
    assert judge_answer(" yes\n", "yes", ["exact_match"]) == {"exact_match": 1.0}
    assert judge_answer("Yes", "yes", ["exact_match"]) == {"exact_match": 0.0}
