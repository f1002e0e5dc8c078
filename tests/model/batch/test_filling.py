import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.data.batches.collate import collate
from qlora_lightning.data.samples.sample import make_sample
from qlora_lightning.model import judging
from qlora_lightning.model.layout import fill_up, filled
from qlora_lightning.model.loss import next_labels


def batch_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(5, 40_000, (length,), generator=generator).tolist() for length in lengths]
    return collate([make_sample(ids, [-100, *ids[1:]], row) for row, ids in enumerate(drawn)])


def with_targets(batch):
    return {**batch, "targets": next_labels(batch["labels"][0])[None]}


def test_a_sample_without_labels_fills_the_last_block():
    filled = fill_up(with_targets(batch_of(10, 9)))
    assert [filled[name].shape for name in ("input_ids", "position_ids", "targets")] == [(1, 32)] * 3
    assert filled["cu_seqlens"].tolist() == [0, 10, 19, 32]
    assert filled["cu_seqlens"].dtype == torch.int32
    assert filled["position_ids"][0, 19:].tolist() == list(range(13))
    assert filled["targets"][0, 19:].tolist() == [-100] * 13
    assert filled["longest"] == 13
    assert filled["input_ids"][0, 18:].unique().numel() == 1  # the last token again


def test_a_batch_of_whole_blocks_stays_as_it_is():
    batch = with_targets(batch_of(10, 6))
    assert fill_up(batch) == dict(batch)


def test_the_tokens_that_fill_up_have_places_behind_all_others():
    batch = {**with_targets(batch_of(10, 9)), "stream_places": torch.arange(19)}
    assert fill_up(batch)["stream_places"].tolist() == list(range(32))


def test_tokens_are_counted_as_they_are_filled_up():
    assert [filled(tokens) for tokens in (1, 16, 17)] == [16, 16, 32]


@pytest.mark.parametrize("options", [{}, {"fast": False}, {"neftune_alpha": 5.0}], ids=str)
def test_loss_and_gradients_are_those_of_the_batch_alone(tiny_base, options, monkeypatch):
    def train():
        torch.manual_seed(0)
        module = QLoRAModule(str(tiny_base), rank=4, compute_dtype="fp32", quantization="none", **options)
        module.configure_model()
        sums = module.train().compute_loss(batch_of(70, 14))
        sums.nll_sum.backward()
        return [sums.nll_sum.detach(), sums.labelled_tokens, sums.correct, *(p.grad for p in module.parameters())]

    filled = train()
    monkeypatch.setattr(judging, "fill_up", lambda batch: batch)
    for one, other in zip(filled, train(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
