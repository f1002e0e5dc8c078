"""Full disks and kills while a run saves: what was good stays good, and the run goes on from it."""

import csv
import os
import resource
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file

from qlora_lightning import AdapterCheckpoint
from qlora_lightning.callbacks import checkpoint_file as finding
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import RunFolder
from qlora_lightning.support.errors import UserError
from tests.dying import MachineFailed

OPTIONS = {"val_check_interval": 4, "limit_val_batches": 1, "max_epochs": 1}  # saves at steps 2, 4, 6 and 8


class At(lightning.Callback):
    """Does something when a step's batch begins: before the save of that step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1:
            self.act()


@pytest.fixture
def run(fit, make_module, tmp_path):
    """Train in a folder with all that writes into it, from its last checkpoint if there is one; `rank` sets sizes."""

    def call(folder, *callbacks, rank=2, every=2, mode="min", **options):
        found = options.pop("ckpt_path", None) or finding.find_checkpoint(tmp_path / folder, "last")
        logger = MetricsLogger(tmp_path / folder)
        writers = [RunFolder({}), AdapterCheckpoint(every_n_train_steps=every, mode=mode)]
        module = make_module(rank=rank, dropout=0.1)
        fit(*callbacks, *writers, module=module, folder=folder, logger=logger, ckpt_path=found, **OPTIONS, **options)

    return call


def contents(folder):
    """The files of a run that a later save may not damage."""
    files = [file for part in ("checkpoints", "adapter") for file in (folder / part).glob("**/*") if file.is_file()]
    return {file.relative_to(folder): file.read_bytes() for file in files}


def assert_same_end(folder, other):
    first, second = (torch.load(each / "checkpoints" / "last.ckpt", weights_only=True) for each in (folder, other))
    assert second["global_step"] == first["global_step"] == 8
    assert all(torch.equal(second["state_dict"][name], tensor) for name, tensor in first["state_dict"].items())
    assert {f.name for f in (other / "checkpoints").iterdir()} == {f.name for f in (folder / "checkpoints").iterdir()}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (other / "adapter" / name).read_bytes() == (folder / "adapter" / name).read_bytes()
    assert sorted(os.listdir(other)) == sorted(os.listdir(folder))
    tables = [list(csv.DictReader((each / "metrics.csv").read_text().splitlines())) for each in (folder, other)]
    assert tables[0] == tables[1]


@pytest.fixture
def small_files():
    """Let no file grow beyond so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("rank", "most", "file"),
    [(64, 1_000_000, "checkpoints/unfinished.ckpt"), (2, 1_000_000, "adapter")],  # of the adapter, tokenizer.json
)
def test_a_full_disk_ends_the_run_with_a_sentence_and_it_goes_on_when_there_is_room(
    run, small_files, tmp_path, rank, most, file
):
    run("whole", rank=rank)
    before = {}

    def remember_and_fill():
        before.update(contents(tmp_path / "full"))
        small_files(most)()

    with pytest.raises(UserError) as told:
        run("full", At(8, remember_and_fill), rank=rank)
    small_files(resource.RLIM_INFINITY)()
    folder = tmp_path / "full"
    last = folder / "checkpoints" / "last.ckpt"
    best = folder / "checkpoints" / "step-000008.ckpt"  # which is whole when the adapter folder is not
    whole, name = (best, best) if file == "adapter" else (last, "last")
    assert str(told.value) == (
        f"{folder}/{file} could not be written: File too large. {whole} is whole: when that is mended, resume from "
        f"it with `--ckpt_path {name}`."
    )
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after.keys() - before.keys() if "unfinished" in str(name) or ".writing" in str(name)]
    assert torch.load(last, weights_only=True)["global_step"] == 6
    run("full", rank=rank)
    assert_same_end(tmp_path / "whole", folder)


def test_a_full_disk_at_the_first_save_says_that_nothing_is_saved(run, small_files, tmp_path):
    with pytest.raises(UserError, match=r"Nothing had been saved before: start again when that is mended"):
        run("full", At(1, small_files(1_000_000)), rank=64)
    assert not list((tmp_path / "full" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("step", "mode", "most", "best"),
    [
        (8, "max", 10_000, 4),  # the last save has no room for itself
        (8, "min", 1_000_000, 8),  # the last save has no room for tokenizer.json; nothing is left to train
    ],
)
def test_a_full_disk_beside_a_whole_checkpoint_names_it_and_the_run_goes_on_from_there(
    run, small_files, tmp_path, step, mode, most, best
):
    run("whole", mode=mode)
    checkpoints = tmp_path / "full" / "checkpoints"
    last, best = checkpoints / "last.ckpt", checkpoints / f"step-{best:06d}.ckpt"

    def damage_and_fill():
        if last.exists():
            last.write_bytes(last.read_bytes()[:-100])
        small_files(most)()

    with pytest.raises(UserError) as told:
        run("full", At(step, damage_and_fill), mode=mode)
    small_files(resource.RLIM_INFINITY)()
    assert f"{best} is whole: when that is mended, resume from it with `--ckpt_path {best}`." in str(told.value)
    run("full", mode=mode, ckpt_path=str(best))
    weights = [tmp_path / folder / "adapter" / "adapter_model.safetensors" for folder in ("whole", "full")]
    assert weights[1].read_bytes() == weights[0].read_bytes()
    if best.name != "step-000008.ckpt":  # from which no step is taken that would write another last.ckpt
        assert_same_end(tmp_path / "whole", tmp_path / "full")


def test_a_full_disk_in_the_metrics_table_is_told(run, monkeypatch, tmp_path):
    def fill():
        monkeypatch.setattr(MetricsLogger, "_to_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))

    with pytest.raises(
        UserError, match=r"full/metrics.csv could not be read or written: No space left\..*`--ckpt_path last`"
    ):
        run("full", At(4, fill))
    assert torch.load(tmp_path / "full" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


class Renames:
    """Counts renames below a folder, and dies in front of one of them; a first run fills the cache elsewhere."""

    def __init__(self, monkeypatch, folder, dies_at=None):
        self.seen, self.folder, self.dies_at, self.replace = [], folder, dies_at, os.replace
        monkeypatch.setattr("os.replace", self)

    def __call__(self, one, other):
        if self.folder in Path(other).parents:
            self.seen.append(os.path.basename(other))
        if self.dies_at is not None and len(self.seen) == self.dies_at + 1:
            raise MachineFailed
        self.replace(one, other)


def kill_and_go_on(run, monkeypatch, tmp_path, folder, at):
    Renames(monkeypatch, tmp_path, dies_at=at)
    with pytest.raises(MachineFailed):
        run(folder)
    monkeypatch.undo()
    for file in (tmp_path / folder / "checkpoints").glob("*.ckpt"):
        if file.name != "unfinished.ckpt":
            finding.check_checkpoint(file)
    weights = tmp_path / folder / "adapter" / "adapter_model.safetensors"
    if weights.exists():
        load_file(weights)
    run(folder)
    assert_same_end(tmp_path / "whole", tmp_path / folder)


@pytest.mark.slow
def test_a_kill_in_front_of_any_rename_costs_nothing(run, monkeypatch, tmp_path):
    renames = Renames(monkeypatch, tmp_path)
    run("whole")
    monkeypatch.undo()
    assert renames.seen.count("last.ckpt") == 4
    for at, name in enumerate(renames.seen):
        try:
            kill_and_go_on(run, monkeypatch, tmp_path, f"kill {at}", at)
        except AssertionError as error:
            raise AssertionError(f"killed before rename {at}, of {name}") from error


@pytest.mark.parametrize(("name", "count"), [("last.ckpt", 0), ("last.ckpt", 3), ("adapter_model.safetensors", 1)])
def test_a_kill_between_write_and_rename_costs_nothing(run, monkeypatch, tmp_path, name, count):
    renames = Renames(monkeypatch, tmp_path)
    run("whole")
    monkeypatch.undo()
    places = [at for at, seen in enumerate(renames.seen) if seen == name]
    kill_and_go_on(run, monkeypatch, tmp_path, "killed", places[count])


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_a_kill_between_a_line_of_metrics_and_its_checkpoint_repeats_and_loses_no_line(run, tmp_path, hook):
    run("whole")

    class Die(lightning.Callback):
        def __init__(self):
            def die(trainer, *_):
                if trainer.global_step == (5 if hook == "on_train_batch_end" else 8):
                    raise MachineFailed

            setattr(self, hook, die)

    with pytest.raises(MachineFailed):
        run("killed", Die())
    run("killed")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_what_a_kill_left_unfinished_goes_at_the_next_start(run, tmp_path):
    folder = tmp_path / "killed"
    for name in ("checkpoints/unfinished.ckpt", "checkpoints/step-000004.ckpt.unfinished", "adapter/.writing/half"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half")
    run("killed", limit_train_batches=4)
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step-000004.ckpt"}
    assert not (folder / "adapter" / ".writing").exists()
