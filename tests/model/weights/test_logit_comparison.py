import math

import pytest
import torch
from torch import nn

from qlora_lightning.model.weights.layerwise import Judged, Reference


def judged(*rows):
    """A model whose logits at each token are given."""
    head = nn.Linear(len(rows[0]), len(rows[0]), bias=False)
    nn.init.eye_(head.weight)
    return Judged(torch.tensor(rows), head.requires_grad_(False))


def test_figures_are_those_computed_by_hand():
    even, skew = [0.0, 0.0], [math.log(3), 0.0]  # probabilities 1/2, 1/2 and 3/4, 1/4
    reference = Reference(judged(skew, even), torch.tensor([0, 1]))
    assert reference.loss == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2)
    found = reference.compare(judged(even, [0.0, math.log(3)]))
    kl = [3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2), 1 / 2 * math.log(2 / 1) + 1 / 2 * math.log(2 / 3)]
    assert found.kl == pytest.approx(sum(kl) / 2)
    assert found.largest_kl == pytest.approx(max(kl))
    assert found.loss == pytest.approx((-math.log(1 / 2) - math.log(3 / 4)) / 2)
    assert found.top1 == 0.5  # of equal logits the first counts as the top
    assert found.largest_difference == pytest.approx(math.log(3))
    assert found.mean_difference == pytest.approx(math.log(3) / 2)


def test_a_model_agrees_with_itself_over_many_tokens():
    torch.manual_seed(0)
    rows = torch.randn(150, 7).tolist()
    found = Reference(judged(*rows), torch.zeros(150, dtype=torch.long)).compare(judged(*rows))
    assert (found.kl, found.top1, found.largest_difference) == (0.0, 1.0, 0.0)


def test_nothing_finite_is_seen_as_such():
    reference = Reference(judged([0.0, 1.0]), torch.tensor([0]))
    assert math.isnan(reference.compare(judged([float("nan"), 0.0])).kl)


def test_a_head_in_16_bits_is_used_in_fp32():
    head = nn.Linear(3, 40_000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(2, 3)
    torch.testing.assert_close(Judged(hidden, head).logits(slice(0, 2)), hidden @ head.weight.float().t())
