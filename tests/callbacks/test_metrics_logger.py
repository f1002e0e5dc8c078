import csv

import pytest

from qlora_lightning.callbacks.metrics_logger import MetricsLogger


@pytest.fixture
def logger(tmp_path):
    return MetricsLogger(tmp_path / "run")


def read(file):
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_it_lies_in_the_run_folder_itself(logger, tmp_path):
    assert logger.file == tmp_path / "run" / "metrics.csv"
    assert (logger.save_dir, logger.name, logger.version) == (str(tmp_path / "run"), "", "")
    logger.log_hyperparams({"rank": 8})
    assert not logger.file.exists()


def test_each_step_appends_a_line(logger):
    logger.log_metrics({"train_loss": 1.5}, step=0)
    inode = logger.file.stat().st_ino
    logger.log_metrics({"train_loss": 1.25}, step=1)
    assert logger.file.read_text().splitlines() == ["step,train_loss", "0,1.5", "1,1.25"]
    assert logger.file.stat().st_ino == inode  # appended, not written anew


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


def test_cut_forgets_the_lines_from_a_step_on(logger):
    for step in range(4):
        logger.log_metrics({"train_loss": 1.0}, step=step)
    logger.cut(2)
    assert [row["step"] for row in read(logger.file)] == ["0", "1"]
    logger.log_metrics({"train_loss": 9.0}, step=2)
    assert read(logger.file)[-1] == {"step": "2", "train_loss": "9.0"}


def test_cut_of_no_file_makes_none(logger):
    logger.cut(3)
    assert not logger.file.exists()


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


def test_an_exception_while_widening_leaves_the_table(logger, monkeypatch):
    logger.log_metrics({"train_loss": 1.0}, step=0)
    before = logger.file.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        logger.log_metrics({"val_loss": 1.0}, step=1)
    assert logger.file.read_text() == before
