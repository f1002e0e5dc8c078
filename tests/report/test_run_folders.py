"""Any run folder is read: whole, half, still training; a damaged one is rejected by name."""

import json
import re

import pytest

from qlora_lightning import UserError
from qlora_lightning.report import read_metrics, read_run, render_report


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", "{ [", "is not JSON"),
        ("evaluation.json", 100_000 * "[", "is not JSON"),
        ("evaluation.json", "[]", "expected a JSON object"),
        ("manifest.json", {"format_version": 2}, "version 2"),
        ("manifest.json", {"status": "failed", "progress": {"seconds": 1e400}}, "OverflowError"),
        ("manifest.json", {"lives": [{}]}, "KeyError: 'from_step'"),
        ("evaluation.json", {"metrics": {"loss": None}}, "AttributeError"),
    ],
)
def test_a_damaged_file_is_named_with_its_fault(make_run, name, content, words):
    folder = make_run()
    if isinstance(content, dict):
        content = json.dumps({"format": "qlora_lightning manifest", "format_version": 1} | content)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{re.escape(words)}") as error:
        render_report([read_run(folder)])
    assert str(folder) in str(error.value)


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
