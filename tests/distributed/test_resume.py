"""A run that is stopped or killed anywhere, or whose disk is full, resumes to the same bytes as one that never stopped.

Windows are of 3, 3 and 2 micro-batches, validations after the third and the sixth of an epoch, each at the end of a
step. So an epoch is, with `|` at the end of a step, and counted from 0 as in the tables below:
`t t t | v v t t t | v v t t |`. The kind "epochs" is validated at an epoch's end: `t t t | t t t | t t | v v`.
"""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from tests.distributed.runs import CONFIG, launch
from tests.equality import contents, differences, read_checkpoint
from tests.errors import MachineFailed

TRAINER = {**CONFIG["trainer"], "devices": 1, "strategy": "auto", "max_epochs": 2, "accumulate_grad_batches": 3}
TRAINER |= {"val_check_interval": 3, "limit_val_batches": 2}
MODEL = {**CONFIG["model"], "dropout": 0.1, "schedule": "cosine", "loraplus_ratio": 4.0}
ROWS = {"train": "rows.jsonl", "val": "rows.jsonl", "batch_size": 2}
PAIRS = {"train": "pairs.jsonl", "val": "pairs.jsonl", "batch_size": 1}
# nothing of their metrics depends on time: each file is the same, byte for byte
UNTIMED = {"gpu_memory": None, "throughput": None}
RATES = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
PLAIN = {**TRAINER, "max_epochs": 1, "callbacks": [RATES]}
RUNS = {
    "rows": {"data": ROWS},
    "epochs": {"data": ROWS, "trainer": {**TRAINER, "val_check_interval": 1.0}},
    "no-validation": {"data": ROWS, "trainer": {**TRAINER, "limit_val_batches": 0}},
    "packed": {"data": {"train": "rows.jsonl", "val": "rows.jsonl", "tokens_per_batch": 160}},
    "pairs": {
        "data": {"class_path": "qlora_lightning.PreferenceDataModule", **PAIRS},
        "model": {"class_path": "qlora_lightning.PreferenceModule", **MODEL},
    },
    "plain": {"data": ROWS, "trainer": PLAIN, **UNTIMED},
    "once": {"data": ROWS, "trainer": {**PLAIN, "val_check_interval": 1.0}, **UNTIMED},
    "two": {"data": {**ROWS, "batch_size": 1}, "trainer": {**TRAINER, "devices": 2, "strategy": "ddp"}},
}
# the run, the batches at whose beginning a signal comes in its first life and those after it, and the steps saved then
SIGNALS = [
    ("rows", [1], [1]),  # inside a window, which ends first
    pytest.param("rows", [2], [1], marks=pytest.mark.slow),  # in the last batch of a window, with a validation due
    pytest.param("rows", [4], [1], marks=pytest.mark.slow),  # in that validation, which ends first
    pytest.param("rows", [6, 0, 10], [2, 3, 6], marks=pytest.mark.slow),
    pytest.param("epochs", [7], [3], marks=pytest.mark.slow),  # in the last of an epoch, with a validation due
    pytest.param("epochs", [8, 9], [3, 6], marks=pytest.mark.slow),  # in that validation, and in that of the next epoch
    pytest.param("no-validation", [7], [3], marks=pytest.mark.slow),  # in the last of an epoch, with nothing behind it
    pytest.param("packed", [13], [4], marks=pytest.mark.slow),
    pytest.param("pairs", [1, 3], [1, 2], marks=pytest.mark.slow),
]
KILLS = [
    ("rows", 6, 1),  # inside a window
    pytest.param("rows", 8, 1, marks=pytest.mark.slow),  # before the first of a validation: its step is not saved
    pytest.param("epochs", 17, 5, marks=pytest.mark.slow),
]
# the run, and the file of it that has its name for the n-th time when the machine fails
KILLS_IN_A_SAVE = [
    ("plain", "last.ckpt", 3),  # of a step that loggers have not got yet
    # of a validation, before the checkpoint of the first one is deleted
    pytest.param("plain", "last.ckpt", 2, marks=pytest.mark.slow),
    # before the checkpoint of that adapter is written
    pytest.param("plain", "adapter_model.safetensors", 2, marks=pytest.mark.slow),
    # before there is a last one, with nothing left to train
    pytest.param("once", "step-000003.ckpt", 1, marks=pytest.mark.slow),
]


def fit(kind, run, at=None, number=15, rank=0):
    """The command of one life of a run, which a signal ends if a batch is named."""
    command = ["fit", "--config", f"resume-{kind}.yaml", "--ckpt_path", "last"]
    command += ["--trainer.default_root_dir", f"resume/{run}"]
    ask = {"class_path": "tests.distributed.hooks.Ask", "init_args": {"at": at, "number": number, "rank": rank}}
    return command if at is None else [*command, "--trainer.callbacks", json.dumps([ask])]


@pytest.fixture(scope="module")
def runs(folder):
    common = {"seed_everything": 3, "evaluation": None, "model": MODEL, "trainer": TRAINER}
    for kind, own in RUNS.items():
        (folder / f"resume-{kind}.yaml").write_text(yaml.safe_dump({**common, **own}))
    return folder


@pytest.fixture(scope="module")
def whole(runs):
    """Train a kind of run in peace, once; return its folder."""

    def train(kind):
        folder = runs / "resume" / f"{kind}-whole"
        if not folder.exists():
            assert main(fit(kind, folder.name)) == 0
        return folder

    return train


@pytest.fixture(autouse=True)
def _inside(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(runs / "cache"))


def step_of(run):
    return read_checkpoint(run)["global_step"] if (run / "checkpoints" / "last.ckpt").exists() else 0


def saved(run):
    """The files of a run that a later save may not damage."""
    return contents(run / "checkpoints") | contents(run / "adapter")


def assert_same_end(whole, run):
    assert differences(whole, run) == []
    assert saved(whole).keys() == saved(run).keys()


@pytest.mark.parametrize(("kind", "stops", "steps"), SIGNALS)
def test_a_run_that_a_signal_stops_resumes_to_the_same_end(runs, whole, kind, stops, steps):
    run = runs / "resume" / f"{kind}-{stops}"
    for at, step in zip(stops, steps, strict=True):
        assert main(fit(kind, run.name, at)) == 128 + 15
        assert step_of(run) == step
    assert main(fit(kind, run.name)) == 0
    assert_same_end(whole(kind), run)


@pytest.mark.parametrize(("kind", "at", "step"), KILLS)
def test_a_run_that_is_killed_resumes_to_the_same_end(runs, whole, kind, at, step):
    run = runs / "resume" / f"{kind}-killed-{at}"
    with pytest.raises(MachineFailed):
        main([*fit(kind, run.name, at, number=0), "--adapter_checkpoint.every_n_train_steps", "1"])
    assert step_of(run) == step
    assert main(fit(kind, run.name)) == 0
    assert_same_end(whole(kind), run)


@pytest.mark.slow
def test_a_kill_between_write_and_rename_costs_nothing(runs, whole, monkeypatch):
    run, replace = runs / "resume" / "renamed", os.replace

    def die(one, other):
        if Path(other).name == "last.ckpt" and Path(other).exists():
            raise MachineFailed
        replace(one, other)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(MachineFailed):
            main([*fit("rows", run.name), "--adapter_checkpoint.every_n_train_steps", "1"])
    for name in ("checkpoints/unfinished", "adapter/.writing/half"):  # what a kill may also leave
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"half")
    assert main(fit("rows", run.name)) == 0
    assert_same_end(whole("rows"), run)


@pytest.mark.parametrize(("kind", "name", "times"), KILLS_IN_A_SAVE)
def test_a_kill_inside_a_save_leaves_every_file_as_if_it_had_not_been(runs, whole, monkeypatch, kind, name, times):
    run, replace, renamed = runs / "resume" / f"{kind}-{name}-{times}", os.replace, []

    def die(one, other):
        replace(one, other)
        renamed.append(Path(other).name)
        if Path(other).name == name and renamed.count(name) == times:
            raise MachineFailed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(MachineFailed):
            main(fit(kind, run.name))
    assert main(fit(kind, run.name)) == 0
    assert_same_end(whole(kind), run)
    assert (run / "metrics.csv").read_bytes() == (whole(kind) / "metrics.csv").read_bytes()
    assert contents(run / "adapter") == contents(whole(kind) / "adapter")


@pytest.fixture
def most_bytes():
    """Let no file grow beyond so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_it_continues_when_there_is_room(runs, whole, most_bytes, capsys):
    run = runs / "resume" / "full"
    assert main(fit("rows", run.name, at=6)) == 128 + 15
    before = saved(run)
    most_bytes(10_000)  # no room for the weights
    assert main(fit("rows", run.name)) == 2
    most_bytes(resource.RLIM_INFINITY)
    captured, last = capsys.readouterr(), f"resume/{run.name}/checkpoints/last.ckpt"
    assert "File too large" in captured.err
    assert f"{last} is whole: when there is room, resume from it with `--ckpt_path {last}`." in captured.out
    assert saved(run).items() >= before.items()
    assert main(fit("rows", run.name)) == 0
    assert_same_end(whole("rows"), run)


def test_a_damaged_checkpoint_is_rejected_and_without_a_last_one_the_newest_whole_one_is_taken(runs, whole, capsys):
    run = Path(shutil.copytree(whole("rows"), runs / "resume" / "damaged"))
    last, (best,) = run / "checkpoints" / "last.ckpt", run.glob("checkpoints/step-*.ckpt")
    content, tensor = last.read_bytes(), next(iter(read_checkpoint(run)["state_dict"].values()))
    flipped = bytearray(content)
    flipped[content.index(tensor.numpy().tobytes())] ^= 1  # which torch does not notice
    for damaged in (flipped, content[:-9999]):
        last.write_bytes(damaged)
        assert main(fit("rows", run.name)) == 2
        message = rf"cannot be read.* the newest good one, with `--ckpt_path \S*{best.name}`"
        assert re.search(message, capsys.readouterr().err)
    last.unlink()
    half = best.with_name("step-000099.ckpt")
    half.write_bytes(best.read_bytes()[:-100])
    assert main(fit("rows", run.name)) == 0
    half.unlink()
    assert_same_end(whole("rows"), run)


@pytest.mark.slow
def test_two_processes_of_which_one_gets_the_signal_resume_to_the_same_end(runs):
    stops = {1: 1, 8: 2}  # inside a window, and inside a validation; the steps that are saved
    commands = [fit("two", "two-whole")]
    commands += [fit("two", f"two-{at}", at, rank=1) for at in stops]
    commands += [fit("two", f"two-{at}") for at in stops]
    said = launch(runs, commands)
    assert (said.count("code 143"), said.count("code 0")) == (4, 6)
    for at, step in stops.items():
        assert said.count(f"Stopped at step {step} ") == 1
        assert_same_end(runs / "resume" / "two-whole", runs / "resume" / f"two-{at}")
