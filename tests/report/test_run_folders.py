"""Any run folder is read: whole, half, still training; a damaged one is rejected by name."""

import pytest

from qlora_lightning import UserError
from qlora_lightning.report import read_metrics, read_run


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{ ["),
        ("evaluation.json", 100_000 * "["),
        ("evaluation.json", "[]"),
        ("manifest.json", '{"format": "qlora_lightning manifest", "format_version": 2}'),
    ],
)
def test_a_damaged_file_is_named(make_run, name, content):
    folder = make_run()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        read_run(folder)


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        ("step,train_loss,val_loss\n0,2.5,\n1,,1.5\n", {"train_loss": [(1, 2.5)], "val_loss": [(2, 1.5)]}),
        ("step,loss\n0,1.0\n1,nan\n2,inf\n4\n5,2.0\n7,0.12", {"loss": [(1, 1.0), (6, 2.0)]}),
        ("step,lo", {}),
        ("", {}),
    ],
)
def test_half_a_line_and_what_is_no_number_are_left_out_of_metrics(tmp_path, lines, columns):
    file = tmp_path / "metrics.csv"
    assert read_metrics(file) == {}
    file.write_text(lines)
    assert read_metrics(file) == columns
