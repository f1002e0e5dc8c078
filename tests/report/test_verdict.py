from qlora_lightning.report.run import Run
from qlora_lightning.report.verdict import Sample, metric_rows, samples_of

COMPARED = {
    "base": {"loss": 2.0, "token_accuracy": 0.4},
    "adapter": {"loss": 0.5, "token_accuracy": 0.9},
    "samples": [{"prompt": "p", "expected": "x", "base": "y", "adapter": " x\n"}],
}


def make(**files):
    return Run(folder="a", name="a", status="finished", **files)


def test_the_comparison_of_the_fit_is_shown():
    assert metric_rows(make(manifest={"comparison": COMPARED})) == [
        ("loss", [("2", ""), ("0.5", ""), ("−1.5", "")]),
        ("token accuracy", [("40.0%", ""), ("90.0%", ""), ("+50.0%", "")]),
    ]


def test_what_evaluate_measured_comes_first_with_its_intervals():
    match = {
        "base": {"value": 0.0, "low": 0.0, "high": 0.04},
        "adapter": {"value": 0.97, "low": 0.92, "high": 0.99},
        "difference": {"value": 0.97, "low": 0.91, "high": 0.99},
    }
    run = make(evaluation={"metrics": {"exact_match": match}}, manifest={"comparison": COMPARED})
    assert metric_rows(run)[0] == (
        "exact match",
        [("0.0%", "0.0% to 4.0%"), ("97.0%", "92.0% to 99.0%"), ("+97.0%", "+91.0% to +99.0%")],
    )
    assert [name for name, _ in metric_rows(run)] == ["exact match", "loss", "token accuracy"]


def test_samples_are_those_of_evaluate_else_of_the_fit():
    (sample,) = samples_of(make(manifest={"comparison": COMPARED}))
    assert sample == Sample("p", "x", "y", "x")
    assert sample.is_right
    found = {"samples": [{"prompt": "q", "expected": "1", "base": "z" * 5000, "adapter": None}]}
    (other,) = samples_of(make(evaluation=found, manifest={"comparison": COMPARED}))
    assert not other.is_right
    assert other.base == "z" * 1200 + " …"


def test_a_run_without_validation_has_neither():
    assert metric_rows(make()) == []
    assert samples_of(make()) == []
    assert metric_rows(make(manifest={"comparison": None})) == []
