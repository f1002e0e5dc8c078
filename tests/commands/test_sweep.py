"""Which trial a sweep chooses; and the command as a user runs it, on a tiny base."""

import json
import logging
import math
import signal
import statistics
import subprocess
import sys
import time

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands import sweep_study
from qlora_lightning.commands.sweep_trials import Planned, Trial, choose, measure_noise
from tests.commands.conftest import run_command
from tests.equality import metrics, read_adapter, same
from tests.errors import rejects
from tests.rows import counting_rows, write_rows


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
import signal
import time
from pathlib import Path

import lightning


class Ask(lightning.Callback):
    def on_train_start(self, trainer, pl_module):
        self.name = Path(trainer.default_root_dir).name
        with open("begun", "a") as file:
            file.write(self.name + "\\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if os.environ.get("ASK") and pl_module.model.peft_config["default"].r == 4 and batch_idx == 1:
            os.kill(os.getpid(), int(os.environ["ASK"]))
        if os.environ.get("LOSE") == self.name and batch_idx == 1:
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGKILL)
        if os.environ.get("MEET"):
            self.wait(lambda: len(set(Path("begun").read_text().split())) > 1)
        if os.environ.get("LINGER") and batch_idx == 2:
            self.wait(lambda: any(getattr(each, "received", None) for each in trainer.callbacks))

    def wait(self, is_over):
        end = time.monotonic() + 120
        while not is_over() and time.monotonic() < end:
            time.sleep(0.1)
"""
SWEPT = "run/sweep/rank"
WRITTEN = ("study.journal", "sweep.lock", "settings.yaml", "sweep.json", "sweep.png", "chosen.yaml")


DRAWN = ["--search", "model.rank=2..8", "--search", "model.learning_rate=1e-3..1e-1", "--trials", "3", "--seeds", "1"]
SEARCHED = "run/sweep/rank-learning-rate"


def write_files(folder, tiny_base):
    write_rows(folder / "rows.jsonl", counting_rows())
    (folder / "tiny").symlink_to(tiny_base)
    (folder / "stopping.py").write_text(STOPPING)
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def folder(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(write_files(tmp_path, tiny_base))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    logging.getLogger("qlora_lightning").handlers.clear()


@pytest.fixture(scope="module")
def shared(tiny_base, tmp_path_factory):
    """A folder in which two processes have swept, their exit codes, and what each printed."""
    folder = write_files(tmp_path_factory.mktemp("shared"), tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "1")
        patch.setenv("MEET", "1")  # the first trial ends when another has begun
        processes = [start(folder, *DRAWN) for _ in range(2)]
        printed = [process.communicate(timeout=900)[0] for process in processes]
    return folder, [process.returncode for process in processes], printed


def start(folder, *arguments):
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "qlora_lightning", "sweep", "--config", "configs/quickstart.yaml", *arguments]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def sweep(*arguments, code=0):
    """Run the command; return what it printed, its error too."""
    found, out, err = run_command("sweep", "--config", "configs/quickstart.yaml", *arguments)
    assert (found, "Traceback" in err) == (code, False), err
    return out + err


def read(file):
    return json.loads(file.read_text())


def read_begun(folder):
    """Return the trial of each fit that began to train, in order."""
    return (folder / "begun").read_text().split()


def read_figures(sweep_folder):
    """Return the figures without what a sweep has of its own: time."""
    figures = read(sweep_folder / "sweep.json")
    for trial in figures["trials"]:
        del trial["minutes"]
    return figures


@pytest.fixture
def trained(monkeypatch):
    """Let trials end at once, each with a loss of 1; the names of those that were trained."""
    names = []

    def train(folder, command, planned, settings, prune):
        names.append(planned.name)
        return Trial(planned.name, settings, 10, 1.0, 1.0)

    monkeypatch.setattr(sweep_study, "train_trial", train)
    return names


def test_numbers_are_drawn_by_orders_of_magnitude_if_both_ends_are_positive_and_whole_if_both_are(folder, trained):
    ranges = ("model.rank=2..64", "model.learning_rate=1e-6..1e-2", "model.dropout=0..0.5")
    sweep(*(f"--search={each}" for each in ranges), "--seeds", "1")
    found = [trial["settings"] for trial in read(folder / "run/sweep/rank-learning-rate-dropout/sweep.json")["trials"]]
    assert len(found) == 10
    ranks, rates, dropouts = (
        sorted(each[f"model.{key}"] for each in found) for key in ("rank", "learning_rate", "dropout")
    )
    assert all(type(rank) is int and 2 <= rank <= 64 for rank in ranks)
    assert all(1e-6 <= rate <= 1e-2 for rate in rates)
    assert all(0 <= dropout <= 0.5 for dropout in dropouts)
    assert len({*ranks}) > 5 < len({*dropouts})
    # the middle of what is drawn by orders of magnitude is 11 and 1e-4; of equal steps it would be 33 and 5e-3
    assert statistics.median(ranks) < 20
    assert statistics.median(rates) < 1e-3
    assert 0.1 < statistics.median(dropouts) < 0.4


@pytest.mark.parametrize("changed", ["train", "val"])
def test_a_search_continues_on_the_rows_that_it_began_with_alone(folder, trained, changed):
    files = {name: write_rows(folder / f"{name}.jsonl", counting_rows()) for name in ("train", "val")}
    search = ("--data.train=train.jsonl", "--data.val=val.jsonl", "--search=model.rank=2,4", "--seeds=1")
    sweep(*search)
    write_rows(files[changed], counting_rows(15))
    assert "run/sweep/rank holds a sweep with other settings or rows" in sweep(*search, code=2)
    write_rows(files[changed], counting_rows())
    sweep(*search)
    assert trained == ["trial-0", "trial-1"]


def test_a_sweep_without_optuna_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # Python refuses to import it
    printed = sweep("--ranks", "2,4", code=2)
    assert printed == "qlora-lightning: sweep needs Optuna: `pip install 'qlora-lightning[sweep]'`.\n"
    assert not (folder / "run").exists()


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
    assert read_figures(folder / SWEPT) == read_figures(folder / "whole/sweep/rank")


@pytest.mark.slow
def test_two_processes_share_the_trials_of_a_sweep_and_both_end_with_all(shared):
    folder, codes, printed = shared
    assert codes == [0, 0], printed
    names = ["trial-0", "trial-1", "trial-2"]
    assert sorted(read_begun(folder)) == names
    by_process = [{name for name in names if f"{name}: val_loss" in text} for text in printed]
    assert all(by_process)
    assert sorted([*by_process[0], *by_process[1]]) == names
    found = read(folder / SEARCHED / "sweep.json")
    assert [trial["folder"] for trial in found["trials"]] == names
    for trial in found["trials"]:
        assert trial["val_loss"] == min(metrics(folder / SEARCHED / trial["folder"], "val_loss"))
    assert all(f"Chosen: {SEARCHED}/{found['chosen']}/adapter. " in text for text in printed)


@pytest.mark.slow
def test_a_sweep_that_is_killed_in_a_trial_runs_it_again_and_no_other_and_ends_as_one_that_was_not(
    folder, shared, monkeypatch
):
    monkeypatch.setenv("LOSE", "trial-1")
    killed = start(folder, *DRAWN)
    printed, _ = killed.communicate(timeout=900)
    assert killed.returncode == -signal.SIGKILL, printed
    assert not (folder / SEARCHED / "sweep.json").exists()
    monkeypatch.delenv("LOSE")
    sweep(*DRAWN)
    assert read_begun(folder) == ["trial-0", "trial-1", "trial-1", "trial-2"]
    assert read_figures(folder / SEARCHED) == read_figures(shared[0] / SEARCHED)


@pytest.mark.slow
def test_a_trial_above_the_median_of_five_is_ended_early_and_not_chosen(folder, monkeypatch):
    train_trial = sweep_study.train_trial

    def train(folder, command, planned, settings, prune):
        if planned.name == "trial-5":  # its losses, of a random base, are about 10
            return train_trial(folder, command, planned, settings, prune)
        assert not prune([3.0, 2.0])
        return Trial(planned.name, settings, 10, 2.0, 1.0)

    monkeypatch.setattr(sweep_study, "train_trial", train)
    monkeypatch.setenv("LINGER", "1")
    rates = "model.learning_rate=0.01,0.02,0.03,0.04,0.05,1e-9,0.06"
    out = sweep("--search", rates, "--seeds", "1", "--prune", "--trainer.val_check_interval", "1")
    assert 1 <= len(metrics(folder / "run/sweep/learning-rate/trial-5", "val_loss")) < 4
    found = read(folder / "run/sweep/learning-rate/sweep.json")
    assert [trial["folder"] for trial in found["trials"] if trial["pruned"]] == ["trial-5"]
    assert len(found["trials"]) == 7
    assert found["chosen"] == "trial-0"
    assert out.count(", pruned") == 1
    assert out.count(" (pruned)") == 1


def test_a_trial_that_fails_when_it_was_to_be_pruned_ends_the_sweep(tmp_path):
    def prune(losses):
        time.sleep(5)  # meanwhile, the process ends by itself
        return True

    with rejects("sweep.trial", "ends at trial-5, whose training ended with exit code 2"):
        sweep_study.train_trial(tmp_path, ["no-command"], Planned("trial-5", {}), {}, prune)


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
