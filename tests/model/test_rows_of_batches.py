"""The rows of a batch: where they are from, each alone, and their losses and shapes."""

from types import SimpleNamespace

import pytest
import torch

from qlora_lightning import InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.data.samples import SampleSetBuilder
from qlora_lightning.evaluation import judge
from qlora_lightning.evaluation.judge import losses_of_rows
from qlora_lightning.model.batch import BatchShape, cut_into_rows, describe_row, join_places, row_places, shape_of_batch
from qlora_lightning.model.loss import TokenStatistics
from tests.flat import collate

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


def test_a_row_is_described_in_plain_values(data):
    row = collate(SAMPLES[0])
    expected = {"row_id": 5, "place": "train.jsonl:17", "tokens": 3, "labelled_tokens": 2, "text": "[7, 8, 9]"}
    assert describe_row(data, row) == expected
    assert describe_row(None, row) == {**expected, "place": "row 5", "text": None}


def test_a_batch_is_cut_into_what_its_rows_would_be_alone():
    for found, sample in zip(cut_into_rows(collate(*SAMPLES)), SAMPLES, strict=True):
        expected = collate(sample)
        assert found.keys() == expected.keys()
        assert found.pop("longest") == expected.pop("longest")
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert cut_into_rows({"input_ids": torch.ones(1, 2)}) == cut_into_rows(torch.ones(2)) == []


def test_the_shape_of_a_batch_counts_tokens_that_are_computed_once():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 6]])
    labels = torch.tensor([[-100, -100, -100, 4, -100, -100, -100, 5, -100]])
    shape = shape_of_batch({"input_ids": ids, "labels": labels, "cu_seqlens": torch.tensor([0, 4, 9])})
    assert shape == BatchShape((4, 5), 2, (3, 3), (0, 2))
    assert (shape.tokens, shape.computed) == (9, 3 + 3 - 2)
    assert (shape.whole().attended, shape.whole().computed) == ((4, 5), 9)


def test_a_shape_that_is_cut_or_thinned_out_keeps_its_proportions():
    shape = BatchShape(lengths=(10, 20, 30), labelled=30, seen=(9, 19, 29), shared=(4, 0, 4))
    assert shape.cut(12) == BatchShape((10, 12, 12), 17, (9, 12, 12), (4, 0, 4))
    assert shape.longest(2) == BatchShape((30, 20), 25, (29, 19), (0, 0))


# ---- losses ----------------------------------------------------------------------------------------------------------


class HalfLoss(QLoRAModule):
    def compute_loss(self, batch):
        assert len(batch["row_ids"]) == 1  # a loss that may mix rows is given them one by one
        sums = super().compute_loss(batch)
        return sums._replace(nll_sum=0.5 * sums.nll_sum)


def made(cls, base, **options):
    module = cls(base=str(base), compute_dtype="fp32", **options)
    module.configure_model()
    return module.eval()


@pytest.fixture
def rows(tiny_base, rows_file):
    data = InstructionDataModule(val=str(rows_file), tokenizer=str(tiny_base), batch_size=16, system="Count, please.")
    data.setup("validate")
    found = cut_into_rows(next(iter(data.val_dataloader())))
    found[3]["labels"] = torch.full_like(found[3]["labels"], -100)
    return found


@torch.no_grad()
def values(losses):
    return [(float(each.nll_sum), int(each.labelled_tokens), int(each.correct)) for each in losses]


@pytest.mark.parametrize(
    ("options", "most_tokens"),
    [({}, 2048), ({}, 100), ({"fast": False}, 2048), ({"quantization": "int8"}, 2048)],
)
def test_rows_together_have_the_losses_of_each_alone(tiny_base, rows, monkeypatch, options, most_tokens):
    monkeypatch.setattr(judge, "_MOST_TOKENS", most_tokens)
    module = made(QLoRAModule, tiny_base, **options)
    together, alone = values(losses_of_rows(module, rows)), values(map(module.compute_loss, rows))
    assert len(together) == 16
    assert together[3] == (0.0, 0, 0)  # no labels
    assert [each[1:] for each in together] == [each[1:] for each in alone]
    assert [each[0] for each in together] == pytest.approx([each[0] for each in alone], rel=1e-5)


def test_an_overridden_loss_counts_and_a_batch_of_another_kind_is_judged_whole(tiny_base, rows):
    usual, half = made(QLoRAModule, tiny_base), made(HalfLoss, tiny_base)
    expected = [0.5 * nll for nll, *_ in values(losses_of_rows(usual, rows))]
    assert [nll for nll, *_ in values(losses_of_rows(half, rows))] == pytest.approx(expected, rel=1e-5)
    sums = LossSums(torch.tensor(1.0), torch.tensor(2), torch.tensor(1))
    usual.compute_loss = lambda batch: sums
    assert list(losses_of_rows(usual, [{"x": torch.zeros(1)}])) == [sums]


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
