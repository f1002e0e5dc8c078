import math

import pytest
import torch

from qlora_lightning.model.loss import LossSums, TokenStatistics


def sums(nll, tokens, correct):
    return LossSums(torch.tensor(nll), torch.tensor(tokens), torch.tensor(correct))


def test_every_token_weighs_the_same_whatever_the_batch():
    statistics = TokenStatistics()
    statistics.update(sums(2.0, 1, 1))
    statistics.update(sums(3.0, 9, 4))
    values = statistics.compute()
    assert values["loss"] == 0.5  # 5 nats over 10 tokens; the mean of means would be 1.17
    assert values["perplexity"].item() == pytest.approx(math.exp(0.5))
    assert values["token_accuracy"] == 0.5


def test_the_order_of_batches_does_not_matter_over_many_tokens():
    batches = [sums(0.1 * number, 1, 0) for number in range(1000)]
    forward, backward = TokenStatistics(), TokenStatistics()
    for one, other in zip(batches, reversed(batches), strict=True):
        forward.update(one)
        backward.update(other)
    assert forward.compute()["loss"].item() == pytest.approx(49.95, rel=1e-7)
    assert forward.compute()["loss"].float() == backward.compute()["loss"].float()


def test_sums_are_kept_without_their_graph():
    statistics = TokenStatistics()
    statistics.update(LossSums(torch.tensor(1.0, requires_grad=True) * 2, torch.tensor(1), torch.tensor(0)))
    assert not statistics.nll_sum.requires_grad


def test_reset_forgets_and_nothing_gives_nan():
    statistics = TokenStatistics()
    statistics.update(sums(2.0, 1, 1))
    statistics.compute()
    statistics.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert statistics.compute()["loss"].isnan()
    statistics.update(sums(0.0, 0, 0))
    assert all(value.isnan() for value in statistics.compute().values())
