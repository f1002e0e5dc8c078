"""Every fit leaves a manifest and a page, however it ends, and is not disturbed by them."""

import json
import os
import signal

import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, Evaluation, RunReport, StopSignals, ThroughputMonitor
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from tests.callbacks.conftest import At


@pytest.fixture
def manifest(tmp_path):
    return lambda folder="run": json.loads((tmp_path / folder / "manifest.json").read_text())


def fail(trainer):
    raise RuntimeError("the disk is <gone>")


def test_a_fit_leaves_manifest_and_page(fit, manifest, tmp_path, capsys):
    config = {"model": {"base": "tiny", "rank": 2}}
    command = ["qlora-lightning", "fit", "--config", "my config.yaml"]
    after, look = [], Callback()
    look.on_train_end = lambda *_: after.append(torch.get_rng_state())
    trainer, module = fit(
        look,
        RunReport(config, command),
        *(ThroughputMonitor(), Evaluation(rows=2, samples=1, max_new_tokens=2), AdapterCheckpoint()),
        logger=[MetricsLogger(tmp_path / "run")],
        limit_train_batches=4,
        accumulate_grad_batches=2,
        val_check_interval=2,
    )
    found, run = manifest(), tmp_path / "run"
    train, progress = found["data"]["splits"]["train"], found["progress"]
    expected = {
        **{"format": "qlora_lightning manifest", "format_version": 1, "status": "finished", "error": None, "seed": 7},
        "config": config,
        "command": "qlora-lightning fit --config 'my config.yaml'",
        "reproduce": f"qlora-lightning fit --config {run}/config.yaml --trainer.default_root_dir {run}-again",
        "assessment": {"kind": "unknown", "sentences": ["Too short to judge: 2 optimizer steps, of at least 10."]},
    }
    assert {name: found[name] for name in expected} == expected
    assert found["base"]["fingerprint"] == module.identity["fingerprint"]
    assert found["adapter"]["rank"] == 2
    assert found["parameters"]["trainable"] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert (train["rows"], train["samples"]) == (16, 16)
    assert found["data"]["hashes"]["train"] == trainer.datamodule.identity["train"]
    assert found["device"]["kind"] == "cpu"
    assert (progress["steps"], progress["planned_steps"]) == (2, 2)
    assert 0 < progress["labelled_tokens"] < progress["tokens"]
    assert found["metrics"]["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert found["best"]["checkpoint"].startswith("step-")
    assert torch.equal(torch.get_rng_state(), after[0])
    page = (run / "report.html").read_text()
    assert all(words in page for words in ("token accuracy", "Count to"))
    assert page.count("<figure") == 5
    out = capsys.readouterr().out
    assert f"Adapter: {run / 'adapter'} (README.md there says how to load it)\n" in out
    assert f"Report: {run / 'report.html'}" in out
    assert expected["assessment"]["sentences"][0] in out


def test_a_stopped_run_and_an_error_are_reported_as_attempts(fit, manifest, tmp_path):
    last, options = tmp_path / "run/checkpoints/last.ckpt", {"limit_train_batches": 6, "limit_val_batches": 0}

    def start(*more, **changes):
        fit(RunReport(command=["a"]), StopSignals(), AdapterCheckpoint(), *more, **options | changes)

    with pytest.raises(SystemExit):
        start(At(2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)))
    assert manifest()["status"] == "stopped"
    with pytest.raises(RuntimeError, match="the disk is <gone>"):
        start(At(4, fail), ckpt_path=last)
    assert (manifest()["status"], manifest()["error"]) == ("failed", "RuntimeError: the disk is <gone>")
    assert "the disk is &lt;gone&gt;" in (tmp_path / "run" / "report.html").read_text()
    start(ckpt_path=last)
    found = manifest()
    assert found["status"] == "finished"
    steps = [(attempt["from_step"], attempt["to_step"], attempt["status"]) for attempt in found["attempts"]]
    assert steps == [(0, 3, "stopped"), (3, 4, "failed"), (3, 6, "finished")]
    assert found["attempts"][1]["resumed_from"] == str(last)
    assert found["progress"]["seconds"] == pytest.approx(sum(attempt["seconds"] for attempt in found["attempts"]))
