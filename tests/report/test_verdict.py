from qlora_lightning.report.judged import describe_rows
from qlora_lightning.report.run import Run
from qlora_lightning.report.verdict import Answer, Sample, columns_of, metric_rows, samples_of


def make(**files):
    return Run(folder="a", name="a", status="finished", **files)


def test_metrics_are_shown_with_their_difference():
    loss = {"base": {"value": 2.0}, "adapter": {"value": 0.5}, "difference": {"value": -1.5}}
    (row,) = metric_rows(make(evaluation={"metrics": {"loss": loss}}))
    assert row == ("loss", [("2", ""), ("0.5", ""), ("−1.5", "")])


def test_a_loss_below_one_is_no_percentage():
    loss = {"base": {"value": 0.82}, "adapter": {"value": 0.61}, "difference": {"value": -0.21}}
    (row,) = metric_rows(make(evaluation={"metrics": {"loss": loss}}))
    assert row == ("loss", [("0.82", ""), ("0.61", ""), ("−0.21", "")])


def test_intervals_stand_beside():
    match = {
        "base": {"value": 0.0, "low": 0.0, "high": 0.04},
        "adapter": {"value": 0.97, "low": 0.92, "high": 0.99},
        "difference": {"value": 0.97, "low": 0.91, "high": 0.99},
    }
    (row,) = metric_rows(make(evaluation={"metrics": {"exact_match": match}}))
    assert row == (
        "exact match",
        [("0.0%", "0.0% to 4.0%"), ("97.0%", "92.0% to 99.0%"), ("+97.0%", "+91.0% to +99.0%")],
    )


def test_a_named_adapter_has_a_column_and_several_have_one_each():
    one = {"loss": {"base": {"value": 2.0}, "mine": {"value": 0.5}, "difference": {"value": -1.5}}}
    run = make(evaluation={"metrics": one, "rows": 9, "answered_rows": 4, "split": "test"})
    assert [column.heading for column in columns_of(run)] == ["base", "mine", "difference"]
    assert metric_rows(run) == [("loss", [("2", ""), ("0.5", ""), ("−1.5", "")])]
    assert describe_rows(run) == "9 test rows, 4 of them answered"
    two = {"base": {"value": 0.25}, "a": {"value": 0.5}, "b": {"value": 0.75}, "difference": {"value": 0.25}}
    two["differences"] = {"a": {"value": 0.25}, "b": {"value": 0.5}}
    run = make(
        evaluation={"metrics": {"json_f1": two}, "samples": [{"expected": "x", "base": "x", "a": "x", "b": "y"}]}
    )
    assert [column.heading for column in columns_of(run)] == ["base", "a", "a − base", "b", "b − base"]
    assert metric_rows(run) == [
        ("JSON field F1", [(f"{value}%", "") for value in ("25.0", "50.0", "+25.0", "75.0", "+50.0")])
    ]
    (sample,) = samples_of(run)
    assert [(answer.side, answer.is_right) for answer in sample.answers] == [("base", False), ("a", True), ("b", False)]


def test_samples_tell_right_from_wrong_and_are_cut():
    right = {"samples": [{"prompt": "p", "expected": "x", "base": "y", "adapter": " x\n"}]}
    (sample,) = samples_of(make(evaluation=right))
    assert sample == Sample("p", "x", [Answer("base", "y", False), Answer("adapter", "x", True)])
    found = {"samples": [{"prompt": "q", "expected": "1", "base": "z" * 5000, "adapter": ""}]}
    (other,) = samples_of(make(evaluation=found))
    assert other.answers == [Answer("base", "z" * 1200 + " …", False), Answer("adapter", "(empty)", False)]


def test_an_answer_that_is_not_there_is_left_out_and_one_of_nothing_but_space_is_called_empty():
    found = {
        "samples": [{"prompt": "p", "adapter": " \n"}, {"prompt": None, "expected": "", "base": "", "adapter": ""}]
    }
    one, other = samples_of(make(evaluation=found))
    assert one == Sample("p", "–", [Answer("adapter", "(empty)", False)])
    assert other == Sample("–", "(empty)", [Answer("base", "(empty)", False), Answer("adapter", "(empty)", True)])


def test_a_run_without_validation_has_neither():
    assert metric_rows(make()) == []
    assert samples_of(make()) == []
