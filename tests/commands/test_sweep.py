"""The command as a user runs it, on a tiny base."""

import json
import logging
import os
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qlora_lightning.cli import main
from qlora_lightning.commands import training  # noqa: F401  # here, and not inside a test, whose stderr it would keep
from qlora_lightning.commands.sweep import trial as trials
from qlora_lightning.model import base_model

CONFIG = {
    "model": {"base": "tiny", "learning_rate": 0.03, "schedule": "constant", "warmup_ratio": 0.0},
    "data": {"train": "rows.jsonl", "val": "rows.jsonl", "batch_size": 4},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": "run",
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


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def read(file):
    return json.loads(file.read_text())


def test_each_trial_is_the_fit_that_it_stands_for_and_the_base_is_loaded_once(folder, sweep, monkeypatch):
    loads, load = [], base_model.AutoModelForCausalLM.from_pretrained
    main(["fit", "--config", "configs/quickstart.yaml", "--model.rank", "2", "--trainer.default_root_dir", "alone-2"])
    main(["fit", "--config", "configs/quickstart.yaml", "--model.rank", "4", "--trainer.default_root_dir", "alone-4"])

    class Counting(base_model.AutoModelForCausalLM):
        @classmethod
        def from_pretrained(cls, *args, **options):
            loads.append(args)
            return load(*args, **options)

    monkeypatch.setattr(base_model, "AutoModelForCausalLM", Counting)
    out = sweep("--ranks", "2,4", "--json", "found.json")
    assert len(loads) == 1
    for rank in (2, 4):
        alone, trial = adapter(folder / f"alone-{rank}"), adapter(folder / "run" / "sweep-rank" / f"rank-{rank}")
        assert alone.keys() == trial.keys()
        assert all(torch.equal(alone[name], trial[name]) for name in alone)
    found = read(folder / "found.json")
    assert found == read(folder / "run" / "sweep-rank" / "sweep.json")
    assert [trial["value"] for trial in found["trials"]] == [2, 4]
    # the mean over all labelled tokens, row by row, is what validation in batches logs
    for trial in found["trials"]:
        logged = (folder / "run" / "sweep-rank" / trial["folder"] / "metrics.csv").read_text().splitlines()
        column = logged[0].split(",").index("val_loss")
        assert trial["val_loss"] == pytest.approx(float(logged[-1].split(",")[column]), rel=1e-5)
    assert f"Chosen: rank {found['chosen']}" in out
    assert (folder / "run" / "sweep-rank" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_chosen_config_is_one_that_fit_takes_and_it_gives_the_chosen_adapter(folder, sweep):
    config = {**CONFIG, "model": {**CONFIG["model"], "alpha": 3}}
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config))
    sweep("--ranks", "2,4,8", "--min-gain", "100")  # nothing pays so much
    place = folder / "run" / "sweep-rank"
    assert {file.name for file in place.iterdir()} == {"rank-2", "rank-4", "sweep.json", "sweep.png", "chosen.yaml"}
    chosen = yaml.safe_load((place / "chosen.yaml").read_text())
    assert (chosen["model"]["rank"], chosen["model"]["alpha"]) == (2, None)  # the config's alpha was of its own rank
    assert chosen["trainer"]["default_root_dir"] == "run"
    assert main(["fit", "--config", str(place / "chosen.yaml")]) == 0
    alone, trial = adapter(folder / "run"), adapter(place / "rank-2")
    assert all(torch.equal(alone[name], trial[name]) for name in alone)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_ends_as_one_in_peace(folder, sweep, monkeypatch):
    stopping = ("--ranks", "2,4", "--trainer.callbacks", "stopping.Ask")
    sweep(*stopping, "--trainer.default_root_dir", "peace")
    monkeypatch.setenv("ASK", str(int(signal.SIGTERM)))
    out = sweep(*stopping, code=143)
    assert "The same command continues the sweep" in out
    assert "--ckpt_path" not in out
    place = folder / "run" / "sweep-rank"
    assert (place / "rank-2" / "trial.json").exists()
    assert not (place / "rank-4" / "trial.json").exists()
    before = (place / "rank-2" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.delenv("ASK")
    out = sweep(*stopping)
    assert "done before" in out
    assert (place / "rank-2" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    ended, peace = read(place / "sweep.json"), read(folder / "peace" / "sweep-rank" / "sweep.json")
    for found in (ended, peace):
        for trial in found["trials"]:
            del trial["seconds"]
    assert ended == peace


@pytest.mark.slow
def test_a_sweep_begun_again_judges_a_trial_that_was_only_trained_and_compares_no_others(folder, sweep, rows_file):
    sweep("--ranks", "2,4")
    file = folder / "run" / "sweep-rank" / "rank-4" / "trial.json"
    text, found = file.read_text(), read(file)
    file.write_text(text[:50])
    assert "trial.json cannot be read as the result of a trial" in sweep("--ranks", "2,4", code=2)
    file.unlink()
    sweep("--ranks", "2,4")
    again = read(file)
    assert again["rows"] == found["rows"]
    assert again["seconds"] is None
    out = sweep("--ranks", "2,4", "--model.learning_rate", "0.001", code=2)
    assert "holds a trial with other settings" in out
    assert "model.learning_rate: 0.03 → 0.001" in out
    file.unlink()
    rows_file.write_text(rows_file.read_text().replace("Count to 3.", "Count down from 3."))
    assert "The data are not those of the checkpoint" in sweep("--ranks", "2,4", code=2)


@pytest.mark.slow
def test_target_modules_and_learning_rates_are_all_tried(folder, sweep):
    out = sweep("--target-modules", "attention,mlp", "--model.rank", "2")
    found = read(folder / "run" / "sweep-target-modules" / "sweep.json")
    # A and B of rank 2 in two layers: four linears of attention, three of the MLP
    assert [t["parameters"] for t in found["trials"]] == [2 * 2 * (2 * 128 + 2 * 96), 2 * 2 * 3 * 192]
    assert "Chosen: target modules" in out
    sweep("--learning-rates", "1e-9,3e-2", "--min-gain", "0.01")
    found = read(folder / "run" / "sweep-learning-rate" / "sweep.json")
    assert found["chosen"] == 0.03
    assert found["trials"][0]["gain"]["high"] < 0
    assert (folder / "run" / "sweep-learning-rate" / "learning-rate-1e-9" / "trial.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "8,x"], "--ranks is '8,x': expected values with commas between, such as 8,16,32,64."),
        (["--ranks", "8"], "expected two values or more"),
        (["--ranks", "16,8"], "--ranks is '16,8': expected positive integers that rise."),
        (["--ranks", "2,4", "--learning-rates", "1e-4,1e-3"], "a sweep varies one thing at a time"),
        (["--learning-rates", "0,1e-3"], "--learning-rates is '0,1e-3': expected positive numbers."),
        (["--min-gain", "-1"], "--min-gain is -1: expected 0 or more"),
        (["--json", "no/such.json"], "the folder no does not exist"),
        (["--data.val", "null"], "A sweep compares trials on validation rows, and there are none"),
        (["--model.alpha=3"], "--model.alpha 3: in a sweep of ranks alpha follows the rank"),
        (["--model.rank", "3"], "--model.rank 3: the sweep sets model.rank itself, to 2, 4. Leave it out."),
        (["--target-modules", "attention,foo"], "model.target_modules is 'foo', but the base has no such module"),
        (["stray"], "stray. See `qlora-lightning sweep-rank --help`."),
        (["--ckpt_path", "x.ckpt"], "resumes from its own folder by itself"),
        (["--model.adapter", "run/adapter"], "model.adapter: its own rank rules"),
        (["--trainer.fast_dev_run", "true"], "leave it out"),
        (["--model.rnk", "8"], "There is no key 'model.rnk'"),
    ],
)
def test_what_cannot_be_swept_is_told_in_a_sentence(arguments, words, folder, sweep):
    ranks = (
        [] if any(a in arguments for a in ("--ranks", "--learning-rates", "--target-modules")) else ["--ranks", "2,4"]
    )
    out = sweep(*arguments, *ranks, code=2)
    assert words in out
    assert len([line for line in out.splitlines() if line.startswith("qlora-lightning: ")]) == 1
    assert not list(folder.glob("run/*/*/adapter"))


@pytest.mark.slow
def test_a_signal_while_rows_are_judged_ends_the_sweep(folder, sweep, monkeypatch):
    plain = trials.judge_rows

    def asked(module, trainer):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(module, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "judge_rows", asked)
        out = sweep("--ranks", "2,4", code=130)
    assert "The same command continues the sweep" in out
    assert not list(folder.glob("run/*/*/trial.json"))
    sweep("--ranks", "2,4")


def test_names_with_brackets_are_shown_as_they_are(folder, sweep):
    one = ("--trainer.max_steps", 1, "--trainer.default_root_dir", "[/b]")
    said = sweep("--target-modules", ".*[qk]_proj,v_proj", *one)
    assert "[/b]/sweep-target-modules/" in said
    assert "│ .*[qk]_proj" in said
    assert "target modules .*[qk]_proj" in said
