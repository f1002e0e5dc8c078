"""Every fit leaves a manifest and a page, however it ends, by signals too; and its speed is logged."""

import itertools
import json
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, Evaluation, PredictionWriter, RunReport, StopSignals, ThroughputMonitor
from qlora_lightning.callbacks import monitors
from qlora_lightning.callbacks.run_folder import MetricsLogger
from tests.callbacks.conftest import at_step, calls
from tests.equality import read_checkpoint


def interrupt(number):
    """Send a signal that ends this at once."""
    signal.raise_signal(number)
    pytest.fail("it went on")


@pytest.fixture
def manifest(tmp_path):
    return lambda folder="run": json.loads((tmp_path / folder / "manifest.json").read_text())


def test_a_fit_leaves_manifest_and_page(fit, manifest, tmp_path, capsys):
    config = {"model": {"base": "tiny", "rank": 2}}
    command = ["qlora-lightning", "fit", "--config", "my config.yaml"]
    after = []
    look = calls(on_train_end=lambda *_: after.append(torch.get_rng_state()))
    others = ThroughputMonitor(), Evaluation(rows=2, samples=1, max_new_tokens=2), AdapterCheckpoint()
    options = {"limit_train_batches": 4, "accumulate_grad_batches": 2, "val_check_interval": 2}
    options["logger"] = [MetricsLogger(tmp_path / "run")]
    trainer, module = fit(look, RunReport(config, command), *others, **options)
    found, run = manifest(), tmp_path / "run"
    train, progress = found["data"]["splits"]["train"], found["progress"]
    expected = {
        **{"format": "qlora_lightning manifest", "format_version": 1, "status": "finished", "error": None, "seed": 7},
        "config": config,
        "command": "qlora-lightning fit --config 'my config.yaml'",
        "reproduce": f"qlora-lightning fit --config {run}/config.yaml --trainer.default_root_dir {run}-again",
        "assessment": {
            "kind": "unknown",
            "sentences": ["Too short to judge: 2 optimizer steps, and judging takes 10."],
        },
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


def test_a_stopped_run_and_an_error_are_reported_as_attempts(fit, manifest, last, tmp_path):
    options = {"limit_train_batches": 6, "limit_val_batches": 0}

    def fail():
        raise RuntimeError("the disk is <gone>")

    def start(*more, **changes):
        fit(RunReport(command=["a"]), StopSignals(), AdapterCheckpoint(), *more, **options | changes)

    with pytest.raises(SystemExit):
        start(at_step(2, lambda: signal.raise_signal(signal.SIGTERM)))
    assert manifest()["status"] == "stopped"
    with pytest.raises(RuntimeError, match="the disk is <gone>"):
        start(at_step(4, fail), ckpt_path=last)
    assert (manifest()["status"], manifest()["error"]) == ("failed", "RuntimeError: the disk is <gone>")
    assert "the disk is &lt;gone&gt;" in (tmp_path / "run" / "report.html").read_text()
    start(ckpt_path=last)
    found = manifest()
    assert found["status"] == "finished"
    steps = [(attempt["from_step"], attempt["to_step"], attempt["status"]) for attempt in found["attempts"]]
    assert steps == [(0, 3, "stopped"), (3, 4, "failed"), (3, 6, "finished")]
    assert found["attempts"][1]["resumed_from"] == str(last)
    assert found["progress"]["seconds"] == pytest.approx(sum(attempt["seconds"] for attempt in found["attempts"]))


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_its_code_and_reports_how_to_resume(fit, tmp_path, last, capfd, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(SystemExit) as stopped:
        fit(StopSignals(), at_step(2, lambda: signal.raise_signal(number)), AdapterCheckpoint())
    assert stopped.value.code == 128 + number
    said = capfd.readouterr()
    assert f"{number.name}: saving at the end of this step" in said.err
    assert f"Stopped at step 3 in epoch 0, saved in {last}. To resume a fit, add `--ckpt_path last`" in said.out
    assert read_checkpoint(tmp_path / "run")["global_step"] == 3
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_second_ctrl_c_leaves_at_once_and_saves_nothing(fit, tmp_path):
    def interrupt_twice(trainer, *_):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)
            interrupt(signal.SIGINT)

    with pytest.raises(SystemExit) as left:
        fit(StopSignals(), calls(on_before_backward=interrupt_twice), AdapterCheckpoint(every_n_train_steps=1))
    assert type(left.value) is SystemExit  # not of a stop that is saved
    assert isinstance(left.value.__context__, KeyboardInterrupt)
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("verb", "number"), [("validate", signal.SIGTERM), ("predict", signal.SIGHUP)])
def test_a_signal_ends_an_evaluation_at_once(make_module, make_data, make_trainer, rows_file, tmp_path, verb, number):
    before, data = signal.getsignal(number), make_data(predict=str(rows_file))
    sender = calls(**{f"on_{stage}_batch_start": lambda *_: interrupt(number) for stage in ("validation", "predict")})
    trainer = make_trainer(StopSignals(), sender, PredictionWriter())
    with pytest.raises(SystemExit) as stopped:
        getattr(trainer, verb)(make_module(), datamodule=data)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_a_signal_in_the_sanity_check_ends_the_run_after_its_first_step(fit, tmp_path):
    sender = calls(on_sanity_check_end=lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        fit(StopSignals(), sender, AdapterCheckpoint(), num_sanity_val_steps=1)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "run")["global_step"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_the_evaluation_after_training_keeps_what_was_trained(fit, manifest, tmp_path, number):
    before, sender = signal.getsignal(number), calls(on_fit_end=lambda *_: interrupt(number))
    with pytest.raises(SystemExit) as stopped:
        fit(RunReport(), StopSignals(), AdapterCheckpoint(), sender, max_steps=1)
    assert (stopped.value.code, signal.getsignal(number)) == (128 + number, before)
    assert manifest()["status"] == "stopped"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_an_ignored_signal_stays_ignored(fit):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        trainer, _ = fit(StopSignals(), at_step(2, lambda: signal.raise_signal(signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.global_step == 8


# ---- speed -----------------------------------------------------------------------------------------------------------


class Logged(Callback):
    """What was logged with each batch, and the tokens that really went through training."""

    def __init__(self):
        self.lines, self.tokens, self.labelled = [], 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens += int(batch["cu_seqlens"][-1])
        self.labelled += int((batch["labels"] != -100).sum())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.lines.append({name: float(value) for name, value in trainer.callback_metrics.items() if "tokens" in name})


def test_the_speed_is_tokens_by_seconds_of_the_whole_window(fit, monkeypatch):
    clock = itertools.count(1.0)  # moves by a second at each look, so every micro-batch takes one
    monkeypatch.setattr(monitors, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    fit(ThroughputMonitor(), logged := Logged(), limit_train_batches=4, accumulate_grad_batches=4, limit_val_batches=1)
    expected = {"tokens_seen": logged.tokens, "tokens_per_second": pytest.approx(logged.tokens / 4)}
    expected["labelled_tokens_per_second"] = pytest.approx(logged.labelled / 4)
    assert logged.lines == [{}, {}, {}, expected]
