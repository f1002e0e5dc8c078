import json
import logging
import os
import signal
import warnings

import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, Evaluation, RunReport, StopSignals, ThroughputMonitor
from qlora_lightning.callbacks import run_report
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_report import RunWarnings, note_warning
from qlora_lightning.support.errors import TrainingStopped


@pytest.fixture
def manifest(tmp_path):
    return lambda folder="run": json.loads((tmp_path / folder / "manifest.json").read_text())


class At(Callback):
    """Does something at the start of a batch."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act(trainer)


def fail(trainer):
    raise RuntimeError("the disk is <gone>")


def test_a_fit_leaves_manifest_and_page(fit, manifest, tmp_path, capsys):
    config = {"model": {"base": "tiny", "rank": 2}}
    command = ["qlora-lightning", "fit", "--config", "my config.yaml"]
    warn = At(1, lambda trainer: note_warning(trainer, "Loss spike: 9"))
    after = []
    look = Callback()
    look.on_train_end = lambda *_: after.append(torch.get_rng_state())
    trainer, module = fit(
        look,
        RunReport(config, command),
        *(ThroughputMonitor(), Evaluation(rows=2, samples=1, max_new_tokens=2), AdapterCheckpoint(), warn),
        logger=[MetricsLogger(tmp_path / "run")],
        limit_train_batches=4,
        accumulate_grad_batches=2,
        val_check_interval=2,
    )
    found = manifest()
    assert (found["format"], found["format_version"]) == ("qlora_lightning manifest", 1)
    assert (found["status"], found["error"]) == ("finished", None)
    assert found["config"] == config
    assert found["command"] == "qlora-lightning fit --config 'my config.yaml'"
    run = tmp_path / "run"
    assert found["reproduce"] == (
        f"qlora-lightning fit --config {run}/config.yaml --trainer.default_root_dir {run}-again"
    )
    assert found["seed"] == 7
    assert found["base"]["fingerprint"] == module.identity["fingerprint"]
    assert found["adapter"]["rank"] == 2
    assert found["parameters"]["trainable"] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    train = found["data"]["splits"]["train"]
    assert (train["rows"], train["samples"]) == (16, 16)
    assert found["data"]["hashes"]["train"] == trainer.datamodule.identity["train"]
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # one may say +cu132
    assert found["device"]["kind"] == "cpu"
    assert found["peak_memory_gib"]["peak_rss_gib"] > 0.1
    progress = found["progress"]
    assert (progress["steps"], progress["planned_steps"]) == (2, 2)
    assert 0 < progress["labelled_tokens"] < progress["tokens"]
    assert progress["seconds"] == found["lives"][0]["seconds"] > 0
    assert found["metrics"]["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert found["best"]["checkpoint"].startswith("step-")
    updates = found["adapter_updates"]
    assert [update["layer"] for update in updates["q_proj"]] == [0, 1]
    assert all(
        update["ratio"] > 0 and 1 <= update["effective_rank"] <= 2 for each in updates.values() for update in each
    )
    assert torch.equal(torch.get_rng_state(), after[0])
    assert {"text": "Loss spike: 9", "count": 2} in found["warnings"]
    page = (run / "report.html").read_text()
    assert "Loss spike: 9" in page
    assert "token accuracy" in page
    assert "Count to" in page
    assert page.count("<figure") == 5
    assert f"Report: {run / 'report.html'}" in capsys.readouterr().out


def test_an_error_is_told_and_stays_the_error(fit, manifest, tmp_path):
    with pytest.raises(RuntimeError, match="the disk is <gone>"):
        fit(RunReport(), At(2, fail), limit_val_batches=0)
    found = manifest()
    assert (found["status"], found["error"]) == ("failed", "RuntimeError: the disk is <gone>")
    assert found["progress"]["steps"] == 2
    assert "the disk is &lt;gone&gt;" in (tmp_path / "run" / "report.html").read_text()


def test_a_signal_stops_it_and_a_resume_is_a_second_life(fit, manifest, tmp_path):
    stop = At(2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    parts = lambda: (RunReport(command=["a"]), StopSignals(), AdapterCheckpoint(), ThroughputMonitor())  # noqa: E731
    with pytest.raises(TrainingStopped):
        fit(*parts(), stop, limit_train_batches=6, limit_val_batches=0)
    first = manifest()
    assert first["status"] == "stopped"
    fit(*parts(), limit_train_batches=6, limit_val_batches=0, ckpt_path=tmp_path / "run/checkpoints/last.ckpt")
    second = manifest()
    assert second["status"] == "finished"
    assert [(life["from_step"], life["to_step"], life["status"]) for life in second["lives"]] == [
        *[(0, 3, "stopped"), (3, 6, "finished")]
    ]
    assert second["lives"][1]["resumed_from"].endswith("last.ckpt")
    assert second["progress"]["seconds"] == pytest.approx(sum(life["seconds"] for life in second["lives"]))
    fit(throughput := ThroughputMonitor(), limit_train_batches=6, limit_val_batches=0, folder="peace")
    assert second["progress"]["tokens"] == throughput.tokens_seen
    assert second["progress"]["labelled_tokens"] == throughput.labelled_seen > 0


def test_a_checkpoint_is_the_same_with_and_without_it(fit, tmp_path, assert_same):
    kept = {}
    for folder, callbacks in (("with", [RunReport()]), ("without", [])):
        fit(*callbacks, AdapterCheckpoint(), limit_train_batches=3, limit_val_batches=1, folder=folder)
        kept[folder] = torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert_same(kept["with"]["state_dict"], kept["without"]["state_dict"])
    assert kept["with"]["callbacks"].keys() == kept["without"]["callbacks"].keys()
    assert torch.equal(*(kept[folder]["qlora_lightning"]["generators"]["torch"] for folder in ("with", "without")))


def test_a_damaged_manifest_does_not_hold_a_resume_up(fit, manifest, tmp_path, capsys):
    parts = lambda: (RunReport(), AdapterCheckpoint())  # noqa: E731
    fit(*parts(), limit_train_batches=2, limit_val_batches=0)
    (tmp_path / "run" / "manifest.json").write_text("{")
    last = tmp_path / "run/checkpoints/last.ckpt"
    fit(*parts(), limit_train_batches=2, max_epochs=2, limit_val_batches=0, ckpt_path=last)
    assert "is not JSON" in capsys.readouterr().out
    assert len(manifest()["lives"]) == 1


def test_a_page_that_cannot_be_made_does_not_fail_the_run(fit, monkeypatch, capsys):
    monkeypatch.setattr(run_report, "write_run_page", lambda folder: 1 / 0)
    trainer, _ = fit(RunReport(), limit_train_batches=1, limit_val_batches=0)
    assert trainer.state.finished
    assert "The report of the run could not be written: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"enabled": False}])
def test_a_trial_run_or_one_switched_off_leaves_nothing(fit, tmp_path, options):
    enabled = options.pop("enabled", True)
    fit(RunReport(enabled=enabled), limit_train_batches=1, limit_val_batches=0, **options)
    assert not list(tmp_path.glob("run/*.*"))


def test_warnings_of_python_and_of_loggers_are_counted_and_go_where_they_go(caplog):
    shown, found, make = [], RunWarnings(), logging.getLogRecordFactory()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *where: shown.append(str(message))
        found.listen()
        for _ in range(2):
            warnings.warn("slow", UserWarning, stacklevel=1)
        logging.getLogger("some.library").warning("%d rows", 3)
        logging.getLogger("some.library").info("nothing to see")
        found.note("Loss spike: 9")
        found.stop()
    assert found.counts == {"UserWarning: slow": 2, "3 rows": 1, "Loss spike: 9": 1}
    assert shown == ["slow", "slow"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == ["3 rows"]
    assert logging.getLogRecordFactory() is make
    for number in range(200):
        found.note(f"step {number}")
    assert len(found.counts) == 100
