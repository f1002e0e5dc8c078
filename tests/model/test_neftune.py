"""NEFTune's noise: as large as the paper says, from torch's generator, in training only."""

import pytest
import torch

from qlora_lightning.model.layout import add_noise, whole_samples
from tests.steps import make_batch, make_module


def test_noise_of_a_token_follows_the_length_of_its_own_sample():
    width, lengths, alpha = 64, [4, 100], 5.0
    torch.manual_seed(0)
    noise = add_noise(torch.zeros(1, sum(lengths), width), whole_samples(lengths), alpha)[0]
    for length, part in zip(lengths, noise.split(lengths), strict=True):
        bound = alpha / (length * width) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound
        assert part.abs().mean() == pytest.approx(bound / 2, rel=0.1)  # uniform
        # the expected norm of the whole sample's noise is alpha / sqrt(3), whatever its length
        assert part.norm() == pytest.approx(alpha / 3**0.5, rel=0.1)


def test_noise_is_there_in_training_only(tiny_base):
    batch = make_batch((4, 3))

    def losses(alpha, seed=0):
        module = make_module(tiny_base, neftune_alpha=alpha)
        torch.manual_seed(seed)
        return module.compute_loss(batch).nll_sum.item(), module.eval().compute_loss(batch).nll_sum.item()

    plain, noisy = losses(None), losses(5.0)
    assert noisy[0] != plain[0]
    assert noisy == losses(5.0)
    assert noisy[0] != losses(5.0, seed=1)[0]
    assert noisy[1] == plain[1]
    assert losses(1e-30) == plain  # below what a float32 holds: embedding first changes nothing
