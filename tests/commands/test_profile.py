"""The command as a user runs it, on a tiny base."""

import json
import tempfile

import pytest
import torch
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands.profile import _parser
from qlora_lightning.commands.profile.parts import DEQUANTIZATION, PARTS, RECOMPUTATION
from qlora_lightning.model.base_model import load_base
from qlora_lightning.model.kernels.library import is_there
from qlora_lightning.model.kernels.products import _has_amx

CONFIG = {
    "model": {"base": "tiny", "rank": 2, "compute_dtype": "bf16"},
    "data": {"train": "rows.jsonl", "batch_size": 4},
    "trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2, "default_root_dir": "run"},
}
CALLBACK = """
import lightning


class Interrupt(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise KeyboardInterrupt
"""
# A and B of seven linears in two layers: 64 → 64, 32, 32, 64; 64 → 128 twice; 128 → 64
ADAPTER_BYTES = 4 * 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
ADAPTER_TENSORS = 2 * 2 * 7


@pytest.fixture
def folder(tiny_base, rows_file, tmp_path, monkeypatch):
    """A folder with a config where the examples have theirs; it must look the same afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "configs").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "interrupting.py").write_text(CALLBACK)
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["profile", "--config", "configs/quickstart.yaml", *arguments]) == code
        captured = capsys.readouterr()
        assert not list((folder / "temporary").iterdir())
        assert not (folder / "run").exists()
        return captured.out, captured.err

    return run


def examples():
    lines = [line.strip() for line in _parser().format_help().splitlines()]
    return [line for line in lines if line.startswith("qlora-lightning profile --config configs/")]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profile", "--help"])
    assert stop.value.code == 0
    assert all(line in capsys.readouterr().out for line in examples()[:1])
    assert len(examples()) == 2


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_help_run_as_they_stand(line, folder, run, capsys):
    before = {file for file in folder.rglob("*") if "temporary" not in file.parts}
    assert main(line.split()[1:]) == 0
    out = capsys.readouterr().out
    assert "Time of a step" in out
    assert "tokens per step" in out
    assert "kept for backward" in out
    assert ("recomputation" in out) == ("--gradient_checkpointing true" in line)
    new = {file for file in folder.rglob("*") if "temporary" not in file.parts} - before
    assert {file.name for file in new} == ({"profile.json"} if "--json" in line else set())


@pytest.mark.parametrize("settings", [(), ("--model.fast", "false"), ("--gradient_checkpointing", "true")])
def test_all_time_and_memory_is_told(settings, folder, run):
    out, _ = run("--steps", "2", "--json", "found.json", *settings)
    found = json.loads((folder / "found.json").read_text())
    checkpointed = "--gradient_checkpointing" in settings
    recomputes = bool(settings)  # layers, and without fast the head
    by_loops = "--model.fast" not in settings and is_there("multiply", torch.bfloat16) and not _has_amx()
    absent = {DEQUANTIZATION} if by_loops else set()  # it is done inside products
    assert set(found["time"]) == set(PARTS) - absent - (set() if recomputes else {RECOMPUTATION})
    assert all(share["ms"] > 0 and share["calls"] > 0 for share in found["time"].values())
    assert sum(share["share"] for share in found["time"].values()) == pytest.approx(1)
    assert sum(share["ms"] for share in found["time"].values()) == pytest.approx(found["ms_per_step"])
    assert found["steps"] == 2
    if not checkpointed:  # seven linears in two layers, two micro-batches; queries, keys, values of the first end it
        backward = 2 * 4 - 1 if by_loops else 14 - 3  # gradients of what linears share are one sum
        assert found["time"]["base products"]["calls"] == (14 + backward) * 2
    memory = found["memory"]
    assert memory["adapters"] == memory["gradients"] == ADAPTER_BYTES
    assert memory["optimizer"] == 2 * ADAPTER_BYTES + 4 * ADAPTER_TENSORS
    assert memory["base"].keys() == {"nf4", "bfloat16"}
    assert ("attention" in memory["kept"]) == (not checkpointed)
    assert memory["logits"] > 0
    assert memory["peaks"]["peak private memory"] > 0
    assert "100.0%" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps is 0: expected 1 or more."),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--json", "none/found.json"], "--json none/found.json: there is no folder none."),
        (["--json", "configs"], "--json configs: that is a folder"),
        (["--model.rank", "0"], "model.rank is 0"),
        (["--trainer.limit_train_batches", "0"], "No step was profiled"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, words, tiny_base, run):
    load_base(str(tiny_base))  # once, which tells of it
    _, err = run(*arguments, code=2)
    assert words in err
    assert err.count("\n") == 1


def test_ctrl_c_leaves_nothing_behind(folder, run):
    _, err = run("--json", "found.json", "--trainer.callbacks+=interrupting.Interrupt", code=130)
    assert err == "qlora-lightning: interrupted.\n"
    assert not (folder / "found.json").exists()
