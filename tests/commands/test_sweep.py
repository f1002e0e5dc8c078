"""Which trial a sweep chooses; and the command as a user runs it, on a tiny base."""

import json
import logging
import shutil
import signal

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands import training  # noqa: F401  # here, and not inside a test, whose stderr it would keep
from qlora_lightning.commands.sweep.trials import Sweep, Trial, choose, is_done, measure_gain
from tests.equality import read_adapter, same

TARGETS = ("attention", "mlp", "all-linear")
FLAT = [1.0, 1.1, 0.9] * 4


def lower(by):
    """Losses that are lower than FLAT by so much, more or less."""
    return [loss - by * share for loss, share in zip(FLAT, [0.9, 1.1] * 6, strict=True)]


NOISY = [0.5, 1.5] * 6


def trial(value, nll, tokens=None, parameters=10):
    return Trial(f"trial-{value}", value, parameters, 1, 1.0, "same", list(nll), tokens or [1] * len(nll))


def test_the_gain_is_the_difference_of_the_losses_per_token():
    # 6 nats over 4 tokens against 4 nats over 4 tokens
    gain = measure_gain(trial(1, [4.0, 2.0], [3, 1]), trial(2, [3.0, 1.0], [3, 1]))
    # Of the two rows a draw has both, or one of them twice: 1/3 per token, 1/2, or 1.
    assert gain == pytest.approx((0.5, 1 / 3, 1.0))


@pytest.mark.parametrize(
    ("nll", "min_gain", "spread", "expected", "why"),
    [
        ((FLAT, lower(0.2)), 0.3, 0.0, 8, "Rank 16 does not pay: it gains +0.2000 ["),
        ((FLAT, lower(0.2), NOISY), 0.0, 0.1, 16, "Rank 32 does not pay: it gains -0.2000 ["),
        ((FLAT, lower(0.2)), 0.0, 0.3, 8, "Rank 16 does not pay: it gains +0.2000 ["),  # another seed may make more
        ((FLAT, lower(0.2), lower(0.4)), 0.0, 0.0, 32, "Each rank paid over the one before it: a larger one may pay"),
    ],
)
def test_ranks_are_tried_while_they_pay_and_the_last_that_paid_is_chosen(nll, min_gain, spread, expected, why):
    sweep = Sweep("rank", (8, 16, 32), min_gain)
    found = [trial(*each) for each in zip(sweep.values, nll, strict=False)]
    assert not any(is_done(sweep, found[:count], spread) for count in range(len(found)))
    assert is_done(sweep, found, spread)
    chosen, reason = choose(sweep, found, spread)
    assert chosen.value == expected
    assert reason.startswith(why)


@pytest.mark.parametrize(
    ("nll", "parameters", "expected", "why"),
    [
        ((FLAT, lower(-0.2), lower(0.2)), (1, 2, 3), "all-linear", "Within noise of the lowest loss: all-linear."),
        ((FLAT, lower(0.2), NOISY), (5, 5, 5), "mlp", "Within noise of the lowest loss: mlp, all-linear."),
    ],
)
def test_of_other_settings_the_smallest_within_noise_of_the_best_is_chosen(nll, parameters, expected, why):
    sweep = Sweep("target_modules", TARGETS)
    found = [trial(value, *each) for value, *each in zip(TARGETS, nll, [None] * 3, parameters, strict=True)]
    assert not is_done(sweep, found[:2], 0.0)
    assert is_done(sweep, found, 0.0)
    chosen, reason = choose(sweep, found, 0.0)
    assert chosen.value == expected
    assert why in reason


CONFIG = {
    "model": {"base": "tiny", "learning_rate": 0.03, "schedule": "constant", "warmup_ratio": 0.0, "alpha": 3},
    "data": {"train": "rows.jsonl", "val": "rows.jsonl", "batch_size": 4},
    "evaluation": {"enabled": False},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": "run",
        "callbacks": [{"class_path": "stopping.Ask"}],
    },
}
STOPPING = """
import os
import lightning


class Ask(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if os.environ.get("ASK") and pl_module.model.peft_config["default"].r == 4 and batch_idx == 1:
            os.kill(os.getpid(), int(os.environ["ASK"]))
"""
RANKS = ("--ranks", "2,4,8", "--min-gain", "100", "--seeds", "1")  # nothing pays so much: 8 is not tried
SWEPT = "run/sweep-rank"
WRITTEN = ("settings.yaml", "sweep.json", "sweep.png", "chosen.yaml")


@pytest.fixture
def folder(tiny_base, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "stopping.py").write_text(STOPPING)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    yield tmp_path
    logging.getLogger("qlora_lightning").handlers.clear()


@pytest.fixture
def sweep(folder, capsys):
    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["sweep-rank", "--config", "configs/quickstart.yaml", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err

    return run


@pytest.fixture
def swept(folder, sweep, tmp_path_factory):
    """A folder with a sweep over ranks: made once, and copied for each test."""
    whole = tmp_path_factory.getbasetemp() / "swept"
    if not whole.exists():
        sweep(*RANKS)
        shutil.copytree("run", whole)
        shutil.rmtree("run")
    shutil.copytree(whole, "run")
    return folder


def read(file):
    return json.loads(file.read_text())


def test_each_trial_is_the_fit_that_it_stands_for_and_the_chosen_config_is_one_that_fit_takes(folder, sweep):
    alone = ["--model.rank=4", "--model.alpha=null", "--trainer.default_root_dir=alone"]
    assert main(["fit", "--config", "configs/quickstart.yaml", *alone]) == 0
    out = sweep(*RANKS[:-1], "2", "--json", "found.json")
    place = folder / SWEPT
    assert {file.name for file in place.iterdir()} == {"rank-2", "rank-2-seed-1", "rank-4", *WRITTEN}
    assert (place / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = read(folder / "found.json")
    assert found == read(place / "sweep.json")
    assert [trial["value"] for trial in found["trials"]] == [2, 4]
    assert "Chosen: rank-2. Rank 4 does not pay" in out
    assert found["spread_of_seeds"] > 0.0
    assert yaml.safe_load((place / "rank-2-seed-1" / "config.yaml").read_text())["seed_everything"] == 43
    # the mean over all labelled tokens, row by row, is what validation in batches logs
    for trial in found["trials"]:
        logged = (place / trial["folder"] / "metrics.csv").read_text().splitlines()
        column = logged[0].split(",").index("val_loss")
        assert trial["val_loss"] == pytest.approx(float(logged[-1].split(",")[column]), rel=1e-5)
    chosen = yaml.safe_load((place / "chosen.yaml").read_text())
    assert (chosen["model"]["rank"], chosen["model"]["alpha"]) == (2, None)  # the config's alpha was of its own rank
    assert main(["fit", "--config", str(place / "chosen.yaml")]) == 0
    for one, rank in ((folder / "run", 2), (folder / "alone", 4)):
        assert same(read_adapter(one), read_adapter(place / f"rank-{rank}"))


@pytest.mark.slow
def test_a_stopped_sweep_continues_and_ends_as_one_that_was_not_stopped(swept, sweep, monkeypatch, rows_file):
    other = ("--trainer.default_root_dir", "stopped")
    monkeypatch.setenv("ASK", str(int(signal.SIGTERM)))
    out = sweep(*RANKS, *other, code=143)
    assert "The same command continues the sweep" in out
    assert "--ckpt_path" not in out
    place = swept / "stopped" / "sweep-rank"
    before = (place / "rank-2" / "adapter" / "adapter_model.safetensors").read_bytes()
    monkeypatch.delenv("ASK")
    sweep(*RANKS, *other)
    assert (place / "rank-2" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    ended, whole = read(place / "sweep.json"), read(swept / SWEPT / "sweep.json")
    for found in (ended, whole):
        for trial in found["trials"]:
            del trial["seconds"]
    assert ended == whole
    out = sweep(*RANKS, *other, "--model.learning_rate", "0.001", code=2)
    assert "holds a sweep with another model.learning_rate" in out
    rows_file.write_text(rows_file.read_text().replace("Count to 3.", "Count down from 3."))
    assert "The data are not those of the checkpoint" in sweep(*RANKS, *other, code=2)


@pytest.mark.slow
def test_target_modules_and_learning_rates_are_all_tried(folder, sweep):
    out = sweep("--target-modules", "attention,mlp", "--model.rank", "2", "--seeds", "1")
    found = read(folder / "run" / "sweep-target-modules" / "sweep.json")
    # A and B of rank 2 in two layers: four linears of attention, three of the MLP
    assert [t["parameters"] for t in found["trials"]] == [2 * 2 * (2 * 128 + 2 * 96), 2 * 2 * 3 * 192]
    assert "Chosen: target-modules-" in out
    sweep("--learning-rates", "1e-9,3e-2", "--min-gain", "0.01", "--seeds", "1")
    found = read(folder / "run" / "sweep-learning-rate" / "sweep.json")
    assert found["chosen"] == 0.03
    assert found["trials"][0]["gain"]["high"] < 0
