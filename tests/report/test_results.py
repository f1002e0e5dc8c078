import json

import pytest

from qlora_lightning.report.results import find_results, list_results, main_score, write_result
from qlora_lightning.report.run import read_run


def test_figures_come_from_manifest_and_table(make_run):
    assert find_results(read_run(make_run())) == {
        **{"val_loss": 0.45, "test_loss": None, "token_accuracy": 0.9, "test_token_accuracy": None},
        **{"train_loss": 2 - 19 / 20},
        **{"tokens_per_second": 59.5, "peak_memory_gib": 1.5, "minutes": 1.5, "steps": 20, "tokens": 2000},
    }


def test_without_a_manifest_the_table_says_what_it_can(make_run):
    found = find_results(read_run(make_run(manifest=False)))
    assert found["val_loss"] == pytest.approx(0.55)
    assert found["peak_memory_gib"] == 1.25
    assert (found["minutes"], found["steps"], found["tokens"]) == (None, 20, 2000)


def test_what_evaluate_measured_counts_first(make_run):
    folder = make_run()
    (folder / "evaluation.json").write_text(
        '{"metrics": {"loss": {"adapter": {"value": 0.3}}, "exact_match": {"adapter": {"value": 0.75}}}}'
    )
    found = find_results(read_run(folder))
    assert (found["val_loss"], found["exact_match"]) == (0.3, 0.75)


def write(folder, **evaluation):
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return read_run(folder)


def sides(base, adapter, name="adapter"):
    return {"base": {"value": base}, name: {"value": adapter}, "difference": {"value": adapter - base}}


def test_whichever_scores_were_measured_are_shown(make_run):
    metrics = {"loss": sides(2.0, 0.5), "rouge_l": sides(0.2, 0.3), "numeric_match": sides(0.0, 0.25)}
    metrics |= {"stop_rate": sides(0.5, 1.0), "answer_tokens": sides(60.0, 30.0)}
    run = write(make_run("a"), metrics=metrics, scores=["numeric_match", "rouge_l"])
    other = write(make_run("b"), metrics={"chrf": sides(0.1, 0.9)}, scores=["chrf"])
    found = find_results(run)
    assert (found["numeric_match"], found["rouge_l"], main_score(run)) == (0.25, 0.3, "numeric_match")
    headings = {result.name: result.heading for result in list_results([run, other])}
    assert [headings[name] for name in ("numeric_match", "rouge_l", "chrf")] == ["numeric match", "ROUGE-L", "chrF++"]
    assert not {"stop_rate", "answer_tokens", "exact_match"} & {*headings, *found}


def test_an_adapter_counts_whatever_it_was_called(make_run):
    assert find_results(write(make_run("a"), metrics={"loss": sides(2.0, 0.3, "mine")}))["val_loss"] == 0.3
    folder = make_run("b")
    loss = {"base": {"value": 2.0}, "other": {"value": 0.1}, "mine": {"value": 0.3}}
    folders = {"other": "elsewhere", "mine": str(folder / "adapter")}
    found = find_results(write(folder, metrics={"loss": loss}, adapters=folders))
    assert found["evaluated_loss"] == 0.3  # the run's own
    assert find_results(write(folder, metrics={"loss": loss}))["val_loss"] == 0.1  # the first


def test_what_test_rows_gave_is_not_called_validation(make_run):
    metrics = {"loss": sides(2.0, 0.3), "exact_match": sides(0.0, 0.75), "token_accuracy": sides(0.1, 0.8)}
    run = write(make_run(), metrics=metrics, split="test")
    found = find_results(run)
    assert found["val_loss"] == pytest.approx(0.55)  # of metrics.csv
    assert (found["test_loss"], found["test_exact_match"], found["test_token_accuracy"]) == (0.3, 0.75, 0.8)
    assert not {"exact_match"} & found.keys()
    headings = {result.name: result.heading for result in list_results([run])}
    assert headings["test_loss"] == "test loss"
    assert headings["test_exact_match"] == "exact match, test rows"


def test_a_later_evaluation_does_not_stand_for_the_validation_of_the_fit(make_run):
    metrics = {"loss": sides(2.0, 0.3), "exact_match": sides(0.0, 0.75), "token_accuracy": sides(0.1, 0.8)}
    folders = {"adapter": "a/adapter"}  # as named where evaluate was started
    run = write(make_run("a"), metrics=metrics, rows=3, split="val", adapters=folders)
    found = find_results(run)
    assert (found["val_loss"], found["token_accuracy"]) == (pytest.approx(0.55), None)  # of metrics.csv
    assert [found[f"evaluated_{name}"] for name in ("loss", "exact_match", "token_accuracy")] == [0.3, 0.75, 0.8]
    results = {result.name: result for result in list_results([run])}
    assert results["evaluated_loss"].heading == "loss, evaluated on 3 validation rows"
    other = write(make_run("b"), metrics=metrics, rows=5, split="val", adapters={"adapter": "b/adapter"})
    results = {result.name: result for result in list_results([run, other])}
    assert results["evaluated_loss"].heading == "loss, evaluated on 3 and 5 validation rows"
    assert results["evaluated_loss"].better == ""  # of other rows, neither is better
    assert results["val_loss"].better == "low"


def test_figures_of_another_runs_adapter_are_none_of_the_run(make_run):
    metrics = {"loss": sides(2.0, 0.3), "exact_match": sides(0.0, 0.75)}
    for split in ("val", "test"):
        run = write(make_run(split), metrics=metrics, rows=3, split=split, adapters={"adapter": "runs/x/adapter"})
        found = find_results(run)
        assert found["val_loss"] == pytest.approx(0.55)
        assert 0.3 not in found.values()
        assert 0.75 not in found.values()


def test_an_empty_run_has_no_figures(make_run):
    folder = make_run(manifest=False, metrics=False)
    (folder / "metrics.csv").write_text("step,train_loss\n")
    assert set(find_results(read_run(folder)).values()) == {None}


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        *[(None, "loss", "–"), (0.98765, "share", "98.8%"), (1234.5, "whole", "1,234"), (0.12345, "loss", "0.1235")],
        *[(1.2345, "number", "1.23"), (250.4, "number", "250")],
    ],
)
def test_figures_are_written_in_their_style(value, style, text):
    assert write_result(value, style) == text
