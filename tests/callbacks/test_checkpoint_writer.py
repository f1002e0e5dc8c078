import datetime

import numpy as np
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qlora_lightning.callbacks.checkpoint_writer import SaveFaults, find_odd_values, write_checkpoint


class Strategy:
    def __init__(self):
        self.checkpoint_io = TorchCheckpointIO()


class Trainer:
    """Saves as Lightning's does: through the strategy's plugin."""

    def __init__(self, checkpoint):
        self.strategy, self.checkpoint = Strategy(), checkpoint

    def save_checkpoint(self, file, weights_only):
        self.strategy.checkpoint_io.save_checkpoint(self.checkpoint, file)


def test_a_checkpoint_is_written_and_lightnings_own_writer_is_put_back(tmp_path):
    trainer, faults = Trainer({"step": 3, "weights": torch.arange(4.0)}), SaveFaults()
    usual = trainer.strategy.checkpoint_io
    write_checkpoint(trainer, tmp_path / "folder" / "a.ckpt", faults)
    found = torch.load(tmp_path / "folder" / "a.ckpt", weights_only=True)
    assert (found["step"], found["weights"].tolist()) == (3, [0.0, 1.0, 2.0, 3.0])
    assert faults.first is None
    assert trainer.strategy.checkpoint_io is usual


@pytest.mark.parametrize("writes", [b"", b"1234"])
def test_a_failing_disk_is_noted_and_not_raised(tmp_path, monkeypatch, writes):
    def fail(checkpoint, handle):
        handle.write(writes)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", fail)
    faults = SaveFaults()
    write_checkpoint(Trainer({}), tmp_path / "a.ckpt", faults)
    assert faults.first.sentence == f"{tmp_path}/a.ckpt could not be written: No space left on device."


def test_any_other_error_is_raised(tmp_path, monkeypatch):
    class Broken(Trainer):
        def save_checkpoint(self, file, weights_only):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_checkpoint(Broken({}), tmp_path / "a.ckpt", SaveFaults())


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"n": np.float64(1)}, "callbacks['Mine']['n'] is a numpy.float64"),
        ({"seen": [1, datetime.date(2020, 1, 1)]}, "callbacks['Mine']['seen'][1] is a datetime.date"),
        ({"f": lambda: None}, "callbacks['Mine']['f'] is a builtins.function"),  # that no pickle holds at all
        (
            {"a": {"b": np.zeros(2)}, "n": np.float32(1)},
            "callbacks['Mine']['a']['b'] is a numpy.ndarray, callbacks['Mine']['n'] is a numpy.float32",
        ),
    ],
)
def test_a_state_that_weights_only_would_not_read_again_is_noted_by_its_keys(tmp_path, state, told):
    faults = SaveFaults()
    checkpoint = {"global_step": 3, "callbacks": {"Fine": {"seen": {1, 2}}, "Mine": state}}
    write_checkpoint(Trainer(checkpoint), tmp_path / "a.ckpt", faults)
    assert f"would not be read again: {told}; expected tensors, numbers" in faults.first.sentence


def test_what_weights_only_reads_is_not_odd():
    assert find_odd_values({"a": torch.ones(2), "b": [1, 2.5, None, True, "c", (b"d", {3})], 4: {}}) == []


def test_of_several_failures_the_first_is_told(tmp_path):
    faults = SaveFaults()
    for name in ("one", "two"):
        with faults.noting(tmp_path / name):
            raise OSError(30, "Read-only file system")
    assert faults.first.sentence == f"{tmp_path}/one could not be written: Read-only file system."
