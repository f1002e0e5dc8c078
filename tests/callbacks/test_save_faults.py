"""Full disks, kills and damaged files: what was good stays good, and the run continues from it to the same end."""

import os
import resource
from pathlib import Path

import lightning
import pytest
import torch

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, QLoRAModule, UserError
from qlora_lightning.callbacks.checkpoint_file import find_checkpoint
from qlora_lightning.callbacks.run_folder import MetricsLogger, RunFolder
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.support.versions import FORMAT_VERSION
from tests.dying import MachineFailed
from tests.equality import differences, read_checkpoint

TENSOR = torch.arange(5000.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = [f'{{"instruction": "Count to {n}.", "output": "{" ".join(map(str, range(n)))}"}}\n' for n in range(1, 17)]
    (folder / "rows.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def run(tiny_base, root):
    """Train with all that writes into a run folder, from its last checkpoint if there is one; saves at 2, 4, 6, 8."""

    def call(folder, *callbacks):
        lightning.seed_everything(7, verbose=False)
        module = QLoRAModule(str(tiny_base), rank=2, learning_rate=1e-2, dropout=0.1)
        rows = str(root / "rows.jsonl")
        trainer = lightning.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            **{"val_check_interval": 4, "limit_val_batches": 1},
            callbacks=[*callbacks, RunFolder({}), AdapterCheckpoint(every_n_train_steps=2)],
            default_root_dir=root / folder,
            logger=MetricsLogger(root / folder),
        )
        data = InstructionDataModule(rows, val=rows, tokenizer=str(tiny_base), batch_size=2)
        trainer.fit(module, data, ckpt_path=find_checkpoint(root / folder, "last"))

    return call


@pytest.fixture(scope="module")
def whole(run):
    """A run in peace, from its beginning to its end."""
    run("whole")


def contents(folder):
    """The files of a run that a later save may not damage."""
    files = [file for part in ("checkpoints", "adapter") for file in (folder / part).glob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def assert_same_end(run, root, folder):
    """Resume, and compare with the run in peace."""
    run(folder)
    one, other = root / "whole", root / folder
    assert read_checkpoint(other)["global_step"] == 8
    assert differences(one, other) == []
    assert contents(other).keys() == contents(one).keys()
    assert sorted(os.listdir(other)) == sorted(os.listdir(one))


@pytest.fixture
def most_bytes():
    """Let no file grow beyond so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_and_it_continues_when_there_is_room(run, root, whole, most_bytes):
    folder, before = root / "full", {}

    def remember_and_fill(trainer, *_):
        if trainer.global_step == 7:  # before the save of the last step
            before.update(contents(folder))
            most_bytes(10_000)  # no room for the weights

    filler = lightning.Callback()
    filler.on_train_batch_start = remember_and_fill
    with pytest.raises(UserError, match="cannot be written to: File too large") as error:
        run(folder.name, filler)
    most_bytes(resource.RLIM_INFINITY)
    last = folder / "checkpoints" / "last.ckpt"
    assert f"{last} is whole: when that is solved, resume from it with `--ckpt_path {last}`." in str(error.value)
    assert read_checkpoint(folder)["global_step"] == 6
    assert contents(folder) == before
    assert_same_end(run, root, folder.name)


def test_a_kill_between_write_and_rename_costs_nothing(run, root, whole, monkeypatch):
    folder, replace = "renamed", os.replace

    def die(one, other):
        if root / folder in Path(other).parents and Path(other).name == "last.ckpt" and Path(other).exists():
            raise MachineFailed
        replace(one, other)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(MachineFailed):
            run(folder)
    for name in ("checkpoints/unfinished", "adapter/.writing/half"):  # what a kill may also leave
        file = root / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
    assert_same_end(run, root, folder)


def test_last_is_the_last_checkpoint_or_the_newest_whole_one_and_a_damaged_one_is_rejected(tmp_path):
    def write(name, step):
        format_version = {KEY: {"format_version": FORMAT_VERSION}}
        torch.save({"global_step": step, "state_dict": {"w": TENSOR}, **format_version}, folder / name)
        return folder / name

    (folder := tmp_path / "checkpoints").mkdir()
    assert find_checkpoint(tmp_path, None) is find_checkpoint(tmp_path, "last") is None
    write("step-000004.ckpt", 4)
    newest = write("step-000008.ckpt", 8)
    (folder / "step-000012.ckpt").write_bytes(newest.read_bytes()[:-100])
    assert find_checkpoint(tmp_path, "last") == str(newest)
    last = write("last.ckpt", 7)
    assert find_checkpoint(tmp_path, "last") == find_checkpoint(tmp_path / "other", str(last)) == str(last)
    content = bytearray(last.read_bytes())
    content[content.index(TENSOR.numpy().tobytes()) + 9999] ^= 1  # which torch does not notice
    for damaged in (bytes(content), bytes(content[:-9999])):
        last.write_bytes(damaged)
        message = rf"is (damaged|not read).* the newest good one, with `--ckpt_path {newest}`"
        with pytest.raises(UserError, match=message):
            find_checkpoint(tmp_path, "last")
