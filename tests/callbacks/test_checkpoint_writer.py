import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qlora_lightning.callbacks.checkpoint_writer import SaveFaults, write_checkpoint


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
    assert faults.first == f"{tmp_path}/a.ckpt could not be written: No space left on device."


def test_any_other_error_is_raised(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(Trainer({"callback": lambda: None}), tmp_path / "a.ckpt", SaveFaults())


def test_of_several_failures_the_first_is_told(tmp_path):
    faults = SaveFaults()
    for name in ("one", "two"):
        with faults.noting(tmp_path / name):
            raise OSError(30, "Read-only file system")
    assert faults.first == f"{tmp_path}/one could not be written: Read-only file system."
