"""Lightning's loggers come beside ``metrics.csv``, by the config alone."""

import csv
import json

import pytest
import yaml

from qlora_lightning.cli import main


@pytest.mark.filterwarnings("ignore:.*(pkg_resources|datetime.datetime.utcfromtimestamp).*")
def test_tensorboard_logs_what_the_table_holds_also_after_a_resume(tiny_base, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "run"}}
    logger["init_args"] |= {"name": "tensorboard", "version": ""}
    config = {
        "model": {"base": str(tiny_base), "rank": 2, "warmup_ratio": 0.0},
        "data": {"train": str(rows_file), "batch_size": 2},
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": "run"},
            "logger": logger,
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml", "--trainer.max_steps", "2"]) == 0
    assert main(["fit", "--config", "c.yaml", "--trainer.max_steps", "4", "--ckpt_path", "last"]) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["train_loss"]]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train_loss")}
    assert logged == {int(row["step"]): pytest.approx(float(row["train_loss"])) for row in rows}
    assert len(rows) == 4
    saved = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]["trainer"]["logger"]
    assert saved["class_path"] == logger["class_path"]
