import csv

import pytest

from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.support.errors import UserError


@pytest.fixture
def logger(tmp_path):
    return MetricsLogger(tmp_path / "run")


def read(file):
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_a_new_metric_widens_the_table(logger):
    logger.log_metrics({"train_loss": 1.5}, step=0)
    logger.log_metrics({"val_loss": 2.0, "val_perplexity": 7.4}, step=1)
    logger.log_metrics({"train_loss": 1.0}, step=1)
    assert logger.file.read_text().splitlines() == [
        "step,train_loss,val_loss,val_perplexity",
        "0,1.5,,",
        "1,,2.0,7.4",
        "1,1.0,,",
    ]


@pytest.mark.parametrize(
    ("rows", "before_step", "kept"),
    [(0, 0, ""), (2, 0, "01"), (2, 2, "01"), (1, 3, "012"), (0, 2, "01"), (9, 0, "0123")],
)
def test_cut_forgets_the_lines_behind_a_row_but_those_of_earlier_steps(logger, rows, before_step, kept):
    for step in range(4):
        logger.log_metrics({"train_loss": 1.0}, step=step)
    logger.cut(rows, before_step)
    assert "".join(row["step"] for row in read(logger.file)) == kept
    assert logger.rows == len(kept)
    logger.log_metrics({"train_loss": 9.0}, step=7)
    assert read(logger.file)[-1] == {"step": "7", "train_loss": "9.0"}
    assert logger.rows == len(kept) + 1


@pytest.mark.parametrize("cut", [True, False])
def test_half_a_line_goes_wherever_a_kill_has_cut_it(logger, cut):
    logger.log_metrics({"train_loss": 1.5, "val_loss": 2.5}, step=0)
    whole = logger.file.read_text()
    line = "1,1.25,3.5"  # without its end
    for length in range(1, len(line) + 1):
        logger.file.write_text(whole + line[:length])
        again = MetricsLogger(logger.save_dir)
        if cut:
            again.cut(1)
            assert logger.file.read_text() == whole
        again.log_metrics({"train_loss": 1.75}, step=1)
        assert logger.file.read_text() == whole + "1,1.75,\n"
        assert again.rows == 2


def test_a_second_logger_goes_on_in_the_same_file(logger, tmp_path):
    logger.log_metrics({"train_loss": 1.0, "grad_norm": 2.0}, step=0)
    again = MetricsLogger(tmp_path / "run")
    again.log_metrics({"grad_norm": 4.0, "train_loss": 3.0}, step=1)  # in another order
    again.log_metrics({"val_loss": 5.0}, step=2)
    assert read(logger.file) == [
        {"step": "0", "train_loss": "1.0", "grad_norm": "2.0", "val_loss": ""},
        {"step": "1", "train_loss": "3.0", "grad_norm": "4.0", "val_loss": ""},
        {"step": "2", "train_loss": "", "grad_norm": "", "val_loss": "5.0"},
    ]


def test_a_full_disk_while_widening_leaves_the_table_and_is_told(logger, monkeypatch):
    logger.log_metrics({"train_loss": 1.0}, step=0)
    before = logger.file.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"metrics.csv could not be read or written: disk full.*`--ckpt_path last`"):
        logger.log_metrics({"val_loss": 1.0}, step=1)
    assert logger.file.read_text() == before
