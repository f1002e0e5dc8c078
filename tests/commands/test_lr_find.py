import json
import logging
import math
import random

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.tuner.tuning import Tuner

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.cli import main
from qlora_lightning.commands import training  # noqa: F401  # here, and not inside a test, whose stderr it would keep
from qlora_lightning.commands.lr_find import _parser

CONFIG = {
    "model": {"base": "tiny", "rank": 2, "schedule": "linear", "warmup_ratio": 0.5},
    "data": {"train": "rows.jsonl", "val": "rows.jsonl", "batch_size": 4},
    "trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2, "default_root_dir": "run"},
}


@pytest.fixture
def folder(tiny_base, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    yield tmp_path
    logging.getLogger("qlora_lightning").handlers.clear()


@pytest.fixture
def find(folder, capsys):
    def run(*arguments, code=0):
        before = set(folder.rglob("*"))
        capsys.readouterr()
        assert main(["lr-find", "--config", "configs/quickstart.yaml", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert {file.name for file in set(folder.rglob("*")) - before} <= {"lr.json", "lr.png"}
        return captured.out + captured.err

    return run


def examples():
    lines = [line.strip() for line in _parser().format_help().splitlines()]
    return [line for line in lines if line.startswith("qlora-lightning lr-find --config configs/")]


@pytest.mark.slow
def test_the_first_example_of_help_runs_as_it_stands(folder, capsys):
    assert len(examples()) == 2
    assert main(examples()[0].split()[1:]) == 0
    assert "Suggested: --model.learning_rate" in capsys.readouterr().out


@pytest.mark.slow
def test_it_suggests_a_rate_and_leaves_nothing_behind(folder, find):
    out = find("--steps", "20", "--min-lr", "1e-4", "--max-lr", "1e-1", "--json", "lr.json", "--plot", "lr.png")
    found = json.loads((folder / "lr.json").read_text())
    # rising evenly on a logarithmic scale, as Lightning does it
    assert found["learning_rate"][1:] == pytest.approx([1e-4 * 1000 ** (n / 20) for n in range(2, 21)])
    assert found["suggestion"] in found["learning_rate"]
    assert f"Suggested: --model.learning_rate {found['suggestion']:.1e}" in out
    # the mean over a micro-batch's tokens: of a random base about ln(vocabulary), not a sum
    assert found["loss"][0] == pytest.approx(math.log(49152), rel=0.05)
    assert (folder / "lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "12"], "--steps is 12: expected 13 or more."),
        (["--min-lr", "1e-2", "--max-lr", "1e-3"], "expected positive numbers, the first the smaller one"),
        (["--plot", "folder.png"], "--plot folder.png: that is a folder"),
        (["--plot", "/proc/lr.png"], "--plot /proc/lr.png: no file can be written there"),
        (["--plot", "lr.png", "--json", "./lr.png"], "--json and --plot both name"),
        (["--plot", "lr.txt"], "expected a file that ends in .png, .svg or .pdf"),
        (["--model.loraplus_ratio", "16"], "model.loraplus_ratio: Lightning's finder gives A and B the same rate"),
        (["--model.rnk", "3"], "There is no key 'model.rnk'"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(arguments, words, find, folder):
    (folder / "folder.png").mkdir()
    assert words in find(*arguments, code=2)


# ---- Lightning's Tuner in Python ------------------------------------------------------------------------------------


class Exploding(QLoRAModule):
    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        return LossSums(sums.nll_sum * (math.inf if self.trainer.global_step == 15 else 1.0), *sums[1:])


@pytest.fixture
def make(tiny_base, rows_file, tmp_path):
    def made(cls=QLoRAModule, folder="run"):
        lightning.seed_everything(7, verbose=False)
        module = cls(str(tiny_base), rank=2, dropout=0.1, learning_rate=1e-2, compute_dtype="fp32")
        data = InstructionDataModule(str(rows_file), val=str(rows_file), tokenizer=str(tiny_base), batch_size=2)
        trainer = lightning.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 10, "accumulate_grad_batches": 2, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            callbacks=[AdapterCheckpoint()],
            default_root_dir=tmp_path / folder,
        )
        return trainer, module, data

    return made


@pytest.mark.slow
def test_a_fit_after_the_search_is_bit_for_bit_one_without(make, tmp_path):
    trainer, module, data = make(folder="plain")
    trainer.fit(module, data)
    plain = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    drawn = random.random(), torch.rand(1)

    trainer, module, data = make()
    finder = Tuner(trainer).lr_find(module, datamodule=data, num_training=20, max_lr=1e-1, update_attr=False)
    assert finder.suggestion() is not None
    assert not any(file.is_file() for file in (tmp_path / "run").rglob("*"))
    assert (trainer.global_step, module.learning_rate) == (0, 1e-2)
    trainer.fit(module, data)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in module.state_dict().items())
    assert (random.random(), torch.rand(1)) == drawn
    first = torch.load(tmp_path / "plain" / "checkpoints" / "last.ckpt", weights_only=True)
    second = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert first["global_step"] == second["global_step"]
    assert first["lr_schedulers"] == second["lr_schedulers"]


def test_a_loss_that_is_not_finite_ends_the_search_and_not_the_program(make, tmp_path):
    trainer, module, data = make(Exploding)
    finder = Tuner(trainer).lr_find(
        module, datamodule=data, num_training=40, max_lr=1e-3, early_stop_threshold=None, update_attr=True
    )
    assert len(finder.results["loss"]) == 16
    assert finder.suggestion() == module.learning_rate
    assert not any(file.is_file() for file in (tmp_path / "run").rglob("*"))
