"""A signal ends training at the end of a step, saved, and an evaluation at once. What then resumes: test_resume.py."""

import os
import signal

import lightning
import pytest

from qlora_lightning import AdapterCheckpoint, PredictionWriter
from qlora_lightning.callbacks import RunReport, StopSignals
from qlora_lightning.report import read_manifest
from tests.callbacks.conftest import At
from tests.equality import read_checkpoint


def send(number):
    """Send a signal to this process when the third batch of training begins."""
    return At(2, lambda trainer: os.kill(os.getpid(), number))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_its_code_and_reports_how_to_resume(fit, tmp_path, capfd, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(SystemExit) as stopped:
        fit(StopSignals(), send(number), AdapterCheckpoint())
    assert stopped.value.code == 128 + number
    said = capfd.readouterr()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"{number.name}: saving at the end of this step" in said.err
    assert f"Stopped at step 3 in epoch 0, saved in {last}. To resume a fit, add `--ckpt_path last`" in said.out
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
    assert type(left.value) is SystemExit  # not of a stop that is saved
    assert isinstance(left.value.__context__, KeyboardInterrupt)
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("verb", "number"), [("validate", signal.SIGTERM), ("predict", signal.SIGHUP)])
def test_a_signal_ends_an_evaluation_at_once_and_leaves_no_output(
    make_module, make_data, make_trainer, rows_file, tmp_path, verb, number
):
    def send_and_go_on(*_):
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    before, sender = signal.getsignal(number), lightning.Callback()
    sender.on_validation_batch_start = sender.on_predict_batch_start = send_and_go_on
    data = make_data(predict=str(rows_file))
    trainer = make_trainer(StopSignals(), sender, PredictionWriter())
    with pytest.raises(SystemExit) as stopped:
        getattr(trainer, verb)(make_module(), datamodule=data)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


def test_a_signal_in_the_sanity_check_ends_the_run_after_its_first_step(fit, tmp_path):
    sender = lightning.Callback()
    sender.on_sanity_check_end = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        fit(StopSignals(), sender, AdapterCheckpoint(), num_sanity_val_steps=1)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "run")["global_step"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_the_evaluation_after_training_ends_it_at_once_and_keeps_what_was_trained(fit, tmp_path, number):
    before, sender = signal.getsignal(number), lightning.Callback()
    sender.on_fit_end = lambda *_: (os.kill(os.getpid(), number), pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stopped:
        fit(RunReport(), StopSignals(), AdapterCheckpoint(), sender, max_steps=1)
    assert (stopped.value.code, signal.getsignal(number)) == (128 + number, before)
    assert read_manifest(tmp_path / "run")["status"] == "stopped"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_ignored_signal_stays_ignored(fit):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        trainer, _ = fit(StopSignals(), send(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.global_step == 8
