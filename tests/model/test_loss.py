"""The head's loss, in chunks of labeled tokens, is cross-entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_lightning.model.step.loss import LossSums, token_losses
from qlora_lightning.sources.tensors import IGNORED

WIDTH, VOCABULARY = 16, 50
UNLABELLED = [0, 1, 2, 7, 8, 13, 14, 15]


def head_loss(hidden, labels, head, fast=True):
    """The loss of the labeled tokens of a stream."""
    targets = F.pad(labels[1:], (0, 1), value=IGNORED)
    is_labelled = targets != IGNORED
    nll, correct = token_losses(hidden[is_labelled], targets[is_labelled], head, fused=fast)
    return LossSums(nll.sum(), torch.tensor(len(nll)), {"token_accuracy": correct.sum()})


def draw(trainable_head=False, bias=False, labelled=12):
    torch.manual_seed(0)
    hidden = torch.randn(labelled + len(UNLABELLED), WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (len(hidden),))
    labels[UNLABELLED] = -100
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(trainable_head)
    return hidden, labels, head


def full_cross_entropy(hidden, labels, head):
    return F.cross_entropy(head(hidden)[:-1], labels[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("labelled", [512, 513, 1100])  # the logits of 512 exist at a time
@pytest.mark.parametrize(("trainable_head", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("fast", [True, False])
def test_loss_and_gradients_equal_cross_entropy_over_whole_logits(labelled, trainable_head, bias, fast):
    hidden, labels, head = draw(trainable_head, bias, labelled)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected = full_cross_entropy(hidden, labels, head)
    expected_gradients = torch.autograd.grad(expected, inputs)

    sums = head_loss(hidden, labels, head, fast=fast)
    gradients = torch.autograd.grad(3 * sums.loss_sum, inputs)

    assert sums.count == labelled
    assert sums.metrics["token_accuracy"] == (head(hidden)[:-1].argmax(-1) == labels[1:]).sum() > 0
    torch.testing.assert_close(sums.loss_sum, expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        evaluated = head_loss(hidden, labels, head, fast=fast)
    assert all(map(torch.equal, evaluated.by_name().values(), sums.by_name().values()))
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert (gradient / 3 - reference).norm() <= 1e-6 * reference.norm()


def test_without_labelled_tokens_loss_and_gradient_are_zero():
    hidden, labels, head = draw()
    sums = head_loss(hidden, torch.full_like(labels, -100), head)
    sums.loss_sum.backward()
    assert [value.item() for value in sums.by_name().values()] == [0, 0, 0]
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_in_bfloat16_the_sum_is_float32_and_a_factor_on_it_is_not_rounded():
    hidden, labels, head = draw()
    expected = full_cross_entropy(hidden, labels, head)
    hidden, head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
    sums, same_sums = (head_loss(hidden, labels, head) for _ in range(2))
    assert sums.loss_sum.dtype == torch.float32
    torch.testing.assert_close(sums.loss_sum, expected, rtol=1e-2, atol=0)
    (whole,), (third,) = (torch.autograd.grad(each, hidden) for each in (sums.loss_sum, same_sums.loss_sum / 3))
    assert torch.equal(third, (whole.float() / 3).bfloat16())
    assert not torch.equal(third, whole * torch.tensor(1 / 3).bfloat16())
