import os
import signal
import stat

import lightning
import pytest

from qlora_lightning import AdapterCheckpoint, ThroughputMonitor
from qlora_lightning.callbacks import StopSignals
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import PredictionWriter, RunFolder
from qlora_lightning.support.errors import TrainingStopped
from tests.equality import differences, read_checkpoint


class Sender(lightning.Callback):
    """Sends a signal to its own process when the n-th batch begins, batches of validations counted with the others."""

    def __init__(self, number, at):
        self.number, self.at, self.places = number, at, []

    def _count(self, place):
        self.places.append(place)
        if len(self.places) - 1 == self.at:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._count(f"train {trainer.current_epoch}.{batch_idx}")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._count(f"val {trainer.current_epoch}.{batch_idx}")


@pytest.fixture
def stopped_fit(fit, make_module, make_data, tmp_path):
    """Train with everything that a run has, in pieces: a signal ends each but the last."""

    def run(folder, *stops, number=signal.SIGTERM, every_n_train_steps=None, streaming=False, **options):
        last = None
        for at in (*stops, None):
            module = make_module(dropout=0.1, schedule="cosine")
            sender = Sender(number, at)
            callbacks = [
                ThroughputMonitor(),
                RunFolder({}),
                StopSignals(),
                sender,
                AdapterCheckpoint(every_n_train_steps=every_n_train_steps),
            ]
            arguments = {"module": module, "data": make_data(streaming=streaming), "folder": folder, **options}
            arguments |= {"logger": MetricsLogger(tmp_path / folder), "ckpt_path": last}
            if at is None:
                fit(*callbacks, **arguments)
            else:
                with pytest.raises(TrainingStopped) as stopped:
                    fit(*callbacks, **arguments)
                assert stopped.value.code == 128 + number
                # it may have begun the batch behind, or a validation; the two batches of a run's last one are finished
                assert at + 1 <= len(sender.places) <= at + 3
                last = tmp_path / folder / "checkpoints" / "last.ckpt"
        return sender.places

    return run


def assert_same_end(folder, other):
    assert differences(folder, other) == []
    names = [sorted(file.name for file in (run / "checkpoints").iterdir()) for run in (folder, other)]
    assert names[0] == names[1]


# windows of 3, 3 and 2 batches; validations after the fourth and eighth: inside a window, and at the epoch's end
VALIDATED = {"accumulate_grad_batches": 3, "val_check_interval": 4, "limit_val_batches": 2}
SETTINGS = {
    "epochs": {"max_epochs": 2, **VALIDATED},
    "no validation": {"max_epochs": 2, "accumulate_grad_batches": 3, "limit_val_batches": 0, "every_n_train_steps": 2},
    # the sixteen rows come again and again, in a new order: eight batches a pass, twelve in all
    "stream": {"max_epochs": -1, "max_steps": 4, "streaming": True, **VALIDATED},
}


STOPS = {
    "epochs": [
        (1, 2),  # inside a window, and in the validation behind it
        (9,),  # the last batch of an epoch, whose validation is due
        (11,),  # that validation, after its first batch
    ],
    "no validation": [(7,)],  # the last batch of an epoch, with nothing behind it
    "stream": [
        (2, 5),  # inside a window, and again in the second pass over the rows
        (11,),  # the last batch of all: a resume would not run its validation
    ],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stopped_run_resumes_to_the_same_end(stopped_fit, tmp_path, name):
    stopped_fit("whole", **SETTINGS[name])
    for stops in STOPS[name]:
        stopped_fit(f"cut {stops}", *stops, **SETTINGS[name])
        assert_same_end(tmp_path / "whole", tmp_path / f"cut {stops}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_with_its_code_and_reports_how_to_resume(fit, tmp_path, capfd, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    with pytest.raises(TrainingStopped) as stopped:
        fit(StopSignals(), Sender(number, 2), AdapterCheckpoint())
    assert stopped.value.code == 128 + number
    said = capfd.readouterr()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"{name}: saving at the end of this batch." in said.err
    assert ("again leaves at once" in said.err) is (number == signal.SIGINT)
    assert f"Stopped at step 3 in epoch 0, saved in {last}. To resume, add `--ckpt_path last`" in said.out
    assert read_checkpoint(tmp_path / "run")["global_step"] == 3
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_second_ctrl_c_leaves_at_once_and_saves_nothing(fit, tmp_path):
    class Impatient(lightning.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                pytest.fail("it went on")

    with pytest.raises(SystemExit) as left:
        fit(StopSignals(), Impatient(), AdapterCheckpoint(every_n_train_steps=1))
    assert not isinstance(left.value, TrainingStopped)
    assert isinstance(left.value.__context__, KeyboardInterrupt)
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


class EvaluationSender(lightning.Callback):
    """Sends a signal to its own process inside an evaluation."""

    def __init__(self, number):
        self.number = number

    def _send(self, *_):
        os.kill(os.getpid(), self.number)
        pytest.fail("it went on")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _send


@pytest.mark.parametrize(
    ("verb", "number"), [("validate", signal.SIGTERM), ("test", signal.SIGTERM), ("predict", signal.SIGHUP)]
)
def test_a_signal_ends_an_evaluation_at_once_and_leaves_no_output(
    make_module, make_data, make_trainer, rows_file, tmp_path, capfd, verb, number
):
    before = signal.getsignal(number)
    data = make_data(test=str(rows_file), predict=str(rows_file))
    trainer = make_trainer(StopSignals(), EvaluationSender(number), PredictionWriter())
    with pytest.raises(TrainingStopped) as stopped:
        getattr(trainer, verb)(make_module(), datamodule=data)
    assert stopped.value.code == 128 + number
    assert f"{number.name}: the command ends here, unfinished." in capfd.readouterr().err
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_an_ignored_signal_stays_ignored(fit):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        trainer, _ = fit(StopSignals(), Sender(signal.SIGHUP, 2))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.global_step == 8


@pytest.mark.parametrize("auto_requeue", [True, False])
def test_under_slurm_the_saved_job_is_requeued_as_lightning_would(fit, tmp_path, monkeypatch, auto_requeue):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\nls {tmp_path}/run/checkpoints > {tmp_path}/saved\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environment = SLURMEnvironment(auto_requeue=auto_requeue, requeue_signal=signal.SIGUSR2)
    with pytest.raises(TrainingStopped):
        fit(StopSignals(), Sender(signal.SIGUSR2, 2), AdapterCheckpoint(), plugins=[environment])
    assert (tmp_path / "asked").exists() is auto_requeue
    if auto_requeue:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
        assert (tmp_path / "saved").read_text() == "last.ckpt\n"
    assert not list((tmp_path / "run").glob("hpc_ckpt*"))  # Lightning's own, from inside the batch
