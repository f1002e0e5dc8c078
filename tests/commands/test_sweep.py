"""Which trial a sweep chooses; and the command as a user runs it, on a tiny base."""

import json
import logging
import math
import signal

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands.sweep_trials import Trial, choose, measure_noise
from tests.commands.conftest import run_command
from tests.equality import metrics, read_adapter, same


def trial(settings, loss, parameters=10, pruned=False):
    return Trial("trial", settings, parameters, loss, 1.0, pruned)


@pytest.mark.parametrize(
    ("key", "trials", "noise", "chosen", "why"),
    [
        ("rank", [(8, 1.0), (16, 0.8)], 0.3, 8, "Rank 16 does not pay: it gains +0.2000, another seed 0.3000"),
        ("rank", [(8, 1.0), (16, 0.8), (32, 0.9)], 0.1, 16, "Rank 32 does not pay: it gains -0.1000"),
        ("rank", [(8, 1.0), (16, 0.8), (32, 0.6)], 0.1, 32, "Each rank paid over the one before it"),
        ("rank", [(8, 1.0), (16, math.inf)], 0.1, 8, "Rank 16 diverged."),
        ("rank", [(8, 1.0), (16, 0.1)], math.inf, 8, "it gains +0.9000, and another seed alone diverged"),
        # of all values: the fewest parameters of those that the best does not beat by more than noise
        ("target_modules", [("attention", 1.2, 1), ("mlp", 1.0, 2), ("all", 0.8, 3)], 0.1, "all", "modules all."),
        ("target_modules", [("attention", 1.2, 1), ("mlp", 0.9, 2), ("all", 0.8, 3)], 0.2, "mlp", "mlp; target"),
        ("learning_rate", [(1e-4, 0.85), (2e-4, 0.8)], 0.1, 2e-4, "of equals the lowest loss"),
        ("learning_rate", [(1e-4, 0.85), (1.0, math.inf)], math.inf, 1e-4, "loss: learning_rate 0.0001. "),
        ("learning_rate", [(1e-4, 0.85), (2e-4, 0.8, 10, True)], 0.0, 1e-4, "loss: learning_rate 0.0001. "),
    ],
)
def test_a_trial_is_chosen_by_what_another_seed_makes(key, trials, noise, chosen, why):
    found, reason = choose([trial({key: value}, *rest) for value, *rest in trials], noise, key == "rank")
    assert found.settings == {key: chosen}
    assert why in reason


@pytest.mark.parametrize(("losses", "noise"), [([1.0], 0.0), ([1.0, 1.5, 1.25], 0.5), ([1.0, math.inf], math.inf)])
def test_a_seed_that_diverges_counts_in_the_noise(losses, noise):
    assert measure_noise([trial({}, loss) for loss in losses]) == noise


CONFIG = """
model: {base: tiny, learning_rate: 0.03, schedule: constant, warmup: 0.0, alpha: 3}
data: {train: rows.jsonl, val: rows.jsonl, batch_size: 4}
evaluation: {enabled: false}
trainer:
  {accelerator: cpu, devices: 1, max_steps: 4, enable_progress_bar: false, num_sanity_val_steps: 0,
  default_root_dir: run, callbacks: [{class_path: stopping.Ask}]}
"""
STOPPING = """
import os
import lightning


class Ask(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if os.environ.get("ASK") and pl_module.model.peft_config["default"].r == 4 and batch_idx == 1:
            os.kill(os.getpid(), int(os.environ["ASK"]))
"""
SWEPT = "run/sweep/rank"
WRITTEN = ("study.journal", "sweep.lock", "settings.yaml", "sweep.json", "sweep.png", "chosen.yaml")


@pytest.fixture
def folder(tiny_base, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "stopping.py").write_text(STOPPING)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(CONFIG)
    yield tmp_path
    logging.getLogger("qlora_lightning").handlers.clear()


def sweep(*arguments, code=0):
    """Run the command; return what it printed, its error too."""
    found, out, err = run_command("sweep", "--config", "configs/quickstart.yaml", *arguments)
    assert (found, "Traceback" in err) == (code, False), err
    return out + err


def read(file):
    return json.loads(file.read_text())


@pytest.mark.slow
def test_each_trial_is_the_fit_that_it_stands_for_and_the_chosen_config_is_one_that_fit_takes(folder):
    alone = ["--model.rank=4", "--model.alpha=null", "--trainer.default_root_dir=alone"]
    assert main(["fit", "--config", "configs/quickstart.yaml", *alone]) == 0
    out = sweep("--ranks", "2,4", "--seeds", "2", "--json", "found.json")
    place = folder / SWEPT
    assert {file.name for file in place.iterdir()} == {"rank-2", "rank-2-seed-1", "rank-4", *WRITTEN}
    assert (place / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = read(folder / "found.json")
    assert found == read(place / "sweep.json")
    assert [trial["settings"] for trial in found["trials"]] == [{"model.rank": 2}, {"model.rank": 4}]
    # A and B of rank 2 in two layers: four linears of attention, three of the MLP
    assert found["trials"][0]["parameters"] == 2 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    first, second, other = (min(metrics(place / name, "val_loss")) for name in ("rank-2", "rank-2-seed-1", "rank-4"))
    assert [trial["val_loss"] for trial in found["trials"]] == [first, other]
    assert found["spread_of_seeds"] == abs(first - second) > 0.0
    assert yaml.safe_load((place / "rank-2-seed-1" / "config.yaml").read_text())["seed_everything"] == 43
    assert f"Chosen: {SWEPT}/{found['chosen']}/adapter. " in out
    chosen = yaml.safe_load((place / "chosen.yaml").read_text())
    # the config's alpha was of its own rank
    assert (chosen["model"]["rank"], chosen["model"]["alpha"]) == (int(found["chosen"].removeprefix("rank-")), None)
    configs = [yaml.safe_load((place / name / "config.yaml").read_text()) for name in ("rank-2", "rank-4")]
    assert all(each["trainer"]["callbacks"][0]["class_path"] == "stopping.Ask" for each in (chosen, *configs))
    assert main(["fit", "--config", str(place / "chosen.yaml")]) == 0
    for one, name in ((folder / "run", found["chosen"]), (folder / "alone", "rank-4")):
        assert same(read_adapter(one), read_adapter(place / name))


@pytest.mark.slow
def test_trials_of_other_seeds_hold_out_the_same_rows(folder):
    sweep("--ranks", "2,4", "--seeds", "2", "--data.val", "null", "--data.val_fraction", "0.3")
    found = [read(folder / SWEPT / name / "manifest.json")["data"]["hashes"] for name in ("rank-2", "rank-2-seed-1")]
    assert found[0]["val"] == found[1]["val"]


@pytest.mark.slow
def test_a_stopped_sweep_continues_and_ends_as_one_that_was_not_stopped(folder, monkeypatch):
    ranks = ("--ranks", "2,4,8", "--seeds", "1")
    sweep(*ranks, "--trainer.default_root_dir", "whole")
    monkeypatch.setenv("ASK", str(int(signal.SIGTERM)))
    sweep(*ranks, code=143)
    monkeypatch.delenv("ASK")
    out = sweep(*ranks, "--model.learning_rate", "0.001", code=2)
    assert "holds a sweep with other settings or rows" in out
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows[: rows.rindex("{")])
    assert "holds a sweep with other settings or rows" in sweep(*ranks, code=2)
    (folder / "rows.jsonl").write_text(rows)
    sweep(*ranks)
    ended, whole = read(folder / SWEPT / "sweep.json"), read(folder / "whole/sweep/rank/sweep.json")
    for trial in [*ended["trials"], *whole["trials"]]:
        del trial["minutes"]
    assert ended == whole


@pytest.mark.slow
def test_target_modules_and_learning_rates_are_all_tried(folder):
    out = sweep("--search", "model.target_modules=attention,mlp", "--model.rank", "2", "--seeds", "1")
    found = read(folder / "run/sweep/target-modules/sweep.json")
    assert [t["parameters"] for t in found["trials"]] == [2 * 2 * (2 * 128 + 2 * 96), 2 * 2 * 3 * 192]
    assert "Chosen: run/sweep/target-modules/trial-" in out
    out = sweep("--search", "model.learning_rate=1e-9,3e-2,1e30", "--seeds", "1")
    found = read(folder / "run/sweep/learning-rate/sweep.json")
    assert (found["chosen"], found["trials"][2]["val_loss"]) == ("trial-1", None)
    assert "diverged" in out
