import pytest

from qlora_lightning.report.results import find_results, write_result
from qlora_lightning.report.run import read_run


def test_figures_come_from_manifest_and_table(make_run):
    assert find_results(read_run(make_run())) == {
        **{"val_loss": 0.45, "exact_match": None, "token_accuracy": 0.9, "train_loss": 2 - 19 / 20},
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
