"""Full disks, kills and damaged files: what was good stays good, and the run continues from it to the same end."""

import os
import resource
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, QLoRAModule
from qlora_lightning.callbacks.checkpoint_file import check_checkpoint, find_checkpoint
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import RunFolder
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import FORMAT_VERSION
from tests.dying import MachineFailed
from tests.equality import differences, read_checkpoint


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


class Renames:
    """Lists renames below a folder, and dies in front of one of them."""

    def __init__(self, folder, dies_at=None):
        self.seen, self.folder, self.dies_at, self.replace = [], folder, dies_at, os.replace

    def __call__(self, one, other):
        if self.folder in Path(other).parents:
            self.seen.append(os.path.basename(other))
        if self.dies_at is not None and len(self.seen) == self.dies_at + 1:
            raise MachineFailed
        self.replace(one, other)


@pytest.fixture(scope="module")
def whole(run, root):
    """The names of all files that a run renames from its beginning to its end in peace, in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", renames := Renames(root / "whole"))
        run("whole")
    return renames.seen


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


@pytest.mark.parametrize("most", [10_000, 1_000_000])  # no room for the weights; none for the adapter's tokenizer
def test_a_full_disk_ends_the_run_and_it_continues_when_there_is_room(run, root, whole, most_bytes, most):
    folder, before = root / f"full {most}", {}

    def remember_and_fill(trainer, *_):
        if trainer.global_step == 7:  # before the save of the last step
            before.update(contents(folder))
            most_bytes(most)

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


KILLS = [("last.ckpt", 0), ("adapter_model.safetensors", 1), ("step-000008.ckpt", 0)]


@pytest.mark.parametrize(("name", "count"), KILLS)
def test_a_kill_between_write_and_rename_costs_nothing(run, root, whole, name, count):
    at, folder = [number for number, seen in enumerate(whole) if seen == name][count], f"{name} {count}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", Renames(root / folder, dies_at=at))
        with pytest.raises(MachineFailed):
            run(folder)
    for file in (root / folder / "checkpoints").glob("*.ckpt"):
        check_checkpoint(file)
    weights = root / folder / "adapter" / "adapter_model.safetensors"
    if weights.exists():
        load_file(weights)
    assert_same_end(run, root, folder)


def test_a_kill_between_a_line_of_metrics_and_its_checkpoint_repeats_and_loses_no_line(run, root, whole):
    def die(trainer, *_):
        if trainer.global_step == 8:
            raise MachineFailed

    killer, folder = lightning.Callback(), "before the save"
    killer.on_validation_end = die
    with pytest.raises(MachineFailed):
        run(folder, killer)
    for name in ("checkpoints/unfinished", "adapter/.writing/half"):  # what such a kill may also leave
        file = root / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
    assert_same_end(run, root, folder)


# ---- damaged files ----


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def write(file, step):
    content = {"global_step": step, "state_dict": {"w": torch.arange(5000.0)}, KEY: {"format_version": FORMAT_VERSION}}
    torch.save(content, file)
    return file


def test_last_is_the_last_checkpoint_or_the_newest_whole_one_or_a_fresh_start(folder, tmp_path):
    assert find_checkpoint(tmp_path, None) is find_checkpoint(tmp_path, "last") is None
    write(folder / "step-000010.ckpt", 10)
    newest = write(folder / "step-000011.ckpt", 11)
    (folder / "step-000012.ckpt").write_bytes(newest.read_bytes()[:-100])
    assert find_checkpoint(tmp_path, "last") == str(newest)
    last = write(folder / "last.ckpt", 8)
    assert find_checkpoint(tmp_path, "last") == str(last)
    assert find_checkpoint(tmp_path / "other", str(last)) == str(last)


def cut(content):
    return content[: len(content) * 6 // 10]


def flip(content):
    """Flip a bit of a tensor, which torch does not notice."""
    tensor, content = torch.arange(5000.0).numpy().tobytes(), bytearray(content)
    content[content.index(tensor) + len(tensor) * 6 // 10] ^= 1
    return bytes(content)


@pytest.mark.parametrize("damage", [lambda content: b"", cut, flip])
def test_a_damaged_last_is_rejected_and_the_newest_good_one_named(folder, tmp_path, damage):
    last = write(folder / "last.ckpt", 9)
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(UserError, match=rf"{last} is (damaged|not read).* No other is good\."):
        find_checkpoint(tmp_path, "last")
    write(folder / "step-000004.ckpt", 4)
    newest = write(folder / "step-000008.ckpt", 8)
    with pytest.raises(UserError, match=rf"is (damaged|not read).* the newest good one, with `--ckpt_path {newest}`"):
        find_checkpoint(tmp_path, "last")
