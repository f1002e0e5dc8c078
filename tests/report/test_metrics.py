import pytest

from qlora_lightning.report.metrics import highest, last, read_metrics
from qlora_lightning.support.errors import UserError


def write(tmp_path, text):
    file = tmp_path / "metrics.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_columns_become_points_and_steps_count_from_one(tmp_path):
    found = read_metrics(write(tmp_path, "step,train_loss,val_loss\n0,2.5,\n1,2.0,\n1,,1.5\n"))
    assert found == {"train_loss": [(1, 2.5), (2, 2.0)], "val_loss": [(2, 1.5)]}
    assert last(found, "train_loss") == 2.0
    assert highest(found, "train_loss") == 2.5
    assert last(found, "other") is highest(found, "other") is None


def test_half_a_line_and_what_no_run_can_measure_is_left_out(tmp_path):
    lines = ["step,loss", "0,1.0", "1,nan", "2,inf", "3,x", "4", "5,2.0", "6,1e308", "1e308,1", "7,-1e308", "8,0.12"]
    found = read_metrics(write(tmp_path, "\n".join(lines)))
    assert found == {"loss": [(1, 1.0), (6, 2.0)]}


@pytest.mark.parametrize("text", ["", "step,lo", "step,loss\n"])
def test_a_table_that_has_only_begun_has_no_points(tmp_path, text):
    assert not any(read_metrics(write(tmp_path, text)).values())


def test_no_file_gives_no_columns(tmp_path):
    assert read_metrics(tmp_path / "metrics.csv") == {}


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\n"])
def test_another_file_is_refused(tmp_path, content):
    file = tmp_path / "metrics.csv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.csv (is no table of metrics|cannot be read)"):
        read_metrics(file)
