"""Figures of runs: base against adapters with intervals, and several runs compared only if they can be."""

import json

import pytest

from qlora_lightning.report.results import (
    describe_result,
    find_results,
    find_samples,
    main_score,
    metric_rows,
    result_table,
    write_result,
)
from qlora_lightning.report.run import Run, read_run
from tests.report.conftest import MANIFEST


def make(**files):
    return Run(folder="a", name="a", status="finished", **files)


def side(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_a_line_has_one_number_of_digits_and_its_intervals():
    metrics = {
        "loss": {"base": side(2.0, 1.9, 2.1), "adapter": side(0.5), "difference": side(-1.5)},
        "exact_match": {"base": side(0, 0, 0.04), "adapter": side(0.97, 0.92, 0.99), "difference": side(0.97, 0.9, 1)},
    }
    headings, rows = metric_rows(make(evaluation={"metrics": metrics}))
    assert headings == ["base", "adapter", "difference"]
    assert rows == [
        ("loss", [("2.000", "1.900 to 2.100"), ("0.500", ""), ("−1.500", "")]),
        ("exact match", [("0.0 %", "0.0 to 4.0"), ("97.0 %", "92.0 to 99.0"), ("+97.0", "90.0 to 100.0")]),
    ]


def test_several_adapters_have_a_column_each_and_the_right_answers_are_marked():
    two = {"base": side(0.25), "a": side(0.5), "b": side(0.75), "difference": side(0.25)}
    two["differences"] = {"a": side(0.25), "b": side(0.5)}
    samples = [{"prompt": "q", "expected": "x", "base": "x", "a": " x\n", "b": "y" * 5000}, {"prompt": None, "a": " "}]
    run = make(evaluation={"metrics": {"json_f1": two}, "samples": samples})
    headings, rows = metric_rows(run)
    assert headings == ["base", "a", "a − base", "b", "b − base"]
    assert [value for value, _ in rows[0][1]] == ["25.0 %", "50.0 %", "+25.0", "75.0 %", "+50.0"]
    one, other = find_samples(run)
    assert [(answer.side, answer.is_right) for answer in one.answers] == [("base", False), ("a", True), ("b", False)]
    assert one.answers[2].text == "y" * 1200 + " …"
    assert (other.prompt, other.expected, other.answers[0].text) == ("–", "–", "(empty)")
    assert metric_rows(make())[1] == find_samples(make()) == []


def test_a_fit_has_its_figures_from_all_its_files(make_run):
    run = read_run(make_run())
    assert find_results(run) == {
        **{"val_loss": 0.45, "test_loss": None, "token_accuracy": 0.9, "train_loss": pytest.approx(1.05)},
        **{"tokens_per_second": 59.5, "peak_memory_gib": 1.5, "minutes": 1.5, "steps": 20, "tokens": 2000},
    }
    assert main_score(run) is None
    assert set(find_results(make(metrics={"train_loss": []})).values()) == {None}


def test_a_run_without_manifest_has_what_its_table_holds(make_run):
    found = find_results(read_run(make_run(manifest=False)))
    assert (found["val_loss"], found["steps"], found["tokens"]) == (pytest.approx(0.55), 20, 2000)
    assert (found["peak_memory_gib"], found["minutes"]) == (1.25, None)


@pytest.mark.parametrize(
    ("evaluation", "names"),
    [
        ({"split": "test"}, {"test_loss": 0.3, "test_exact_match": 0.75, "test_token_accuracy": 0.8}),
        ({"adapters": {"mine": "runs/a/adapter"}}, {"evaluated_loss": 0.3, "evaluated_exact_match": 0.75}),
        ({"adapters": {"mine": "runs/other/adapter"}}, {}),
    ],
)
def test_what_evaluate_measured_has_names_of_its_own_and_only_of_the_runs_adapter(make_run, evaluation, names):
    folder = make_run()
    metrics = {"loss": {"base": side(1.0), "mine": side(0.3)}, "token_accuracy": {"mine": side(0.8)}}
    metrics["exact_match"] = {"mine": side(0.75)}
    (folder / "evaluation.json").write_text(json.dumps({"metrics": metrics, "rows": 3, **evaluation}))
    found = find_results(read_run(folder))
    assert found["val_loss"] == pytest.approx(0.55)
    assert {name: found[name] for name in names} == names
    assert names or not {0.3, 0.75} & set(found.values())


def test_a_best_is_marked_only_among_runs_measured_on_the_same_rows(make_run):
    def best(*runs):
        return {name: [is_best for _, is_best in cells] for name, _, cells in result_table(runs)}

    other = {"loss": {"base": side(2.0), "adapter": side(0.4)}, "token_accuracy": {"adapter": side(0.8)}}
    one, two = read_run(make_run("a")), read_run(make_run("b", evaluation={"rows": 1, "metrics": other}, seed=1))
    marked = best(one, two)
    assert marked["val_loss"] == [False, True]
    assert marked["token_accuracy"] == [True, False]
    assert not any(any(marked[name]) for name in ("train_loss", "tokens_per_second", "minutes", "peak_memory_gib"))
    rows = {**MANIFEST["data"], "hashes": {"val": "other rows"}}
    three = read_run(make_run("c", evaluation={"rows": 1, "metrics": other}, data=rows))
    assert not any(map(any, best(one, three).values()))
    assert not any(map(any, best(one, one).values()))


@pytest.mark.parametrize(
    ("name", "value", "text", "heading"),
    [
        ("val_loss", None, "–", "validation loss"),
        ("exact_match", 0.98765, "98.8%", "exact match"),
        ("test_rouge_l", 0.5, "50.0%", "ROUGE-L, test rows"),
        ("evaluated_loss", 0.12345, "0.1235", "loss, by evaluate"),
        ("tokens_per_second", 1234.5, "1,234", "tokens/s"),
        ("peak_memory_gib", 1.234, "1.23 GiB", "peak memory"),
        ("minutes", 0.7, "42 s", "wall time"),
        ("minutes", 4.17, "4.2 min", "wall time"),
        ("minutes", 210, "3.5 h", "wall time"),
    ],
)
def test_figures_are_written_with_their_unit(name, value, text, heading):
    assert (write_result(name, value), describe_result(name)) == (text, heading)
