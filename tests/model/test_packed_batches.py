"""Rows that are packed have the losses that they have alone."""

import json
import shutil

import pytest
import torch

from qlora_lightning import InstructionDataModule
from qlora_lightning.cli import main
from tests.steps import make_module

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


def make(base):
    return make_module(base, quantization="none").eval()


def batches(base, file, **settings):
    """Give the micro-batches of an epoch of 16 ragged rows."""
    data = InstructionDataModule(str(file), tokenizer=str(base), **settings)
    data.setup("fit")
    return list(data.train_dataloader())


def losses(module, batches):
    """The loss sum of each row: of its batch with every other row's labels hidden."""
    found = {}
    for batch in batches:
        bounds = batch["cu_seqlens"].tolist()
        for row, start, end in zip(batch["row_ids"].tolist(), bounds, bounds[1:], strict=False):
            labels = torch.full_like(batch["labels"], -100)
            labels[:, start:end] = batch["labels"][:, start:end]
            with torch.no_grad():
                sums = module.compute_loss({**batch, "labels": labels})
            found[row] = (sums.nll_sum.item(), int(sums.labelled_tokens))
    return found


def test_packed_and_alone_each_row_has_the_same_loss(tiny_base, rows_file):
    module, packed = make(tiny_base), batches(tiny_base, rows_file, tokens_per_batch=200)
    alone = batches(tiny_base, rows_file, batch_size=1)
    assert max(len(batch["row_ids"]) for batch in packed) > 2
    together, single = losses(module, packed), losses(module, alone)
    assert together.keys() == single.keys() == set(range(16))
    for row, (nll, tokens) in single.items():
        assert together[row][1] == tokens
        assert together[row][0] == pytest.approx(nll, rel=1e-5)
    assert len({round(nll, 3) for nll, _ in single.values()}) == 16  # so that a swap would show


@pytest.fixture
def dynamic_base(tiny_base, tmp_path):
    """The tiny base with dynamic NTK rotary embedding, which scales by the longest row of a batch beyond 40 tokens."""
    folder = shutil.copytree(tiny_base, tmp_path / "dynamic")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["max_position_embeddings"] = 40
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    file.write_text(json.dumps(config))
    return folder


def test_rows_that_would_turn_each_other_are_refused_before_the_first_step(dynamic_base, rows_file, tmp_path, capsys):
    options = ["--model.base", str(dynamic_base), "--data.train", str(rows_file), "--data.batch_size", "4"]
    options += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    assert main(["fit", *options, "--data.max_length", "41"]) == 2
    assert "Set data.max_length to 40 or less" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_rows_within_the_length_of_pre_training_train_as_they_would_alone(dynamic_base, rows_file):
    module = make(dynamic_base)
    together, single = (
        losses(module, batches(dynamic_base, rows_file, batch_size=size, max_length=40)) for size in (5, 1)
    )
    assert {row: pytest.approx(value, rel=1e-5) for row, value in single.items()} == together
