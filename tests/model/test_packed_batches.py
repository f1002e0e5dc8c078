"""Rows that are packed have the losses that they have alone; where the rows of a batch are from, and its shape."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from qlora_lightning import InstructionDataModule, LossSums
from qlora_lightning.cli import main
from qlora_lightning.data.samples import SampleSetBuilder
from qlora_lightning.model.step.batch import (
    computed_counter,
    cut_into_rows,
    join_places,
    row_places,
)
from qlora_lightning.model.step.loss import TokenStatistics
from tests.flat import collate
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


def test_statistics_weigh_every_token_the_same_whatever_the_batch():
    statistics = TokenStatistics()
    for nll, tokens, correct in ((2.0, 1, 1), (3.0, 9, 4)):
        nll = torch.tensor(nll, requires_grad=True)
        statistics.update(LossSums(nll, torch.tensor(tokens), torch.tensor(correct)))
    assert not statistics.nll_sum.requires_grad
    found = {name: value.item() for name, value in statistics.compute().items()}
    # 5 nats over 10 tokens; the mean of means would be 1.17
    assert found == pytest.approx({"loss": 0.5, "perplexity": 1.6487213, "token_accuracy": 0.5})
    statistics.reset()
    statistics.update(LossSums(torch.tensor(0.0), torch.tensor(0), torch.tensor(0)))
    assert all(value.isnan() for value in statistics.compute().values())


# ---- cut and counted -------------------------------------------------------------------------------------------------

SAMPLES = [([7, 8, 9], [-100, 8, 9], 5), ([4, 3], [-100, 3], 6)]


@pytest.fixture
def data():
    builder = SampleSetBuilder()
    builder.add([7, 8], [-100, 8], 5, 0, "train.jsonl", 17)
    builder.add([9], [-100], 6, 0, "train.jsonl", 18)
    return SimpleNamespace(samples={"train": builder.build()}, tokenizer=SimpleNamespace(decode=str))


def test_places_are_file_and_line_if_the_data_know_them(data):
    assert row_places(data, [6, 5, -1, 40]) == ["train.jsonl:18", "train.jsonl:17", "row 40"]
    assert row_places(None, [3]) == ["row 3"]
    assert join_places(["a", "b", "c"], most=2) == "a, b and 1 more"


def test_a_batch_is_cut_into_what_its_rows_would_be_alone():
    for found, sample in zip(cut_into_rows(collate(*SAMPLES)), SAMPLES, strict=True):
        expected = collate(sample)
        assert found.keys() == expected.keys()
        assert found.pop("longest") == expected.pop("longest")
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert cut_into_rows({"input_ids": torch.ones(1, 2)}) == cut_into_rows(torch.ones(2)) == []


def test_tokens_that_are_computed_are_counted_once():
    builder = SampleSetBuilder()
    builder.add([1, 2, 3, 4], [-100, -100, -100, 4], 0, 0, "train.jsonl", 1)
    builder.add([1, 2, 3, 5, 6], [-100, -100, -100, 5, -100], 1, 0, "train.jsonl", 2)
    samples = builder.build()
    # no token behind the last that predicts, and 1 2 once
    assert computed_counter(samples, True)([0, 1]) == 3 + 3 - 2
    assert computed_counter(samples, False)([0, 1]) == 9
