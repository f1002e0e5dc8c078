from qlora_lightning.report.data_table import data_rows, data_warnings
from qlora_lightning.report.run import read_run


def test_rows_are_told_after_each_filter(make_run):
    splits, rows = data_rows(read_run(make_run()))
    assert splits == ["train"]
    assert rows == [
        ("rows read", ["12"]),
        ("  − bad rows", ["1"]),
        ("  − empty answer", ["2"]),
        ("samples", ["9"]),
        ("tokens", ["400"]),
        ("labelled tokens", ["100 (25%)"]),
        ("samples cut to max_length", ["2"]),
        ("labelled tokens cut away", ["5"]),
    ]


def test_what_makes_results_doubtful_is_said(make_run):
    assert data_warnings(read_run(make_run())) == [
        "1 bad rows of train were left out.",
        "max_length cut 5 labelled tokens away from train.",
    ]


def test_without_a_manifest_nothing_is_known(make_run):
    run = read_run(make_run(manifest=False))
    assert data_rows(run) == ([], [])
    assert data_warnings(run) == []
