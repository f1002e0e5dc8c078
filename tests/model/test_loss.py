import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_lightning.model import loss as loss_module
from qlora_lightning.model.kernels import loops
from qlora_lightning.model.layout import IGNORED, next_labels

TOKENS, WIDTH, VOCABULARY = 20, 16, 50
UNLABELLED = [0, 1, 2, 7, 8, 13, 14, 15]  # 12 labelled tokens are left


def head_loss(hidden, targets, *args, **options):
    """The loss of the labelled tokens of a stream."""
    there = targets != IGNORED
    return loss_module.head_loss(hidden[there], targets[there], *args, **options)


@pytest.fixture(params=["loops", "operators"])
def way(request, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(loops, "can_run", lambda *_: False)


def draw(trainable_head=False, bias=False):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[UNLABELLED] = -100
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(trainable_head)
    return hidden, labels, head


def full_cross_entropy(hidden, labels, head):
    return F.cross_entropy(head(hidden)[:-1], labels[1:], ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 100])  # of 12 labelled tokens: dividing them and not
@pytest.mark.parametrize(("trainable_head", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("fast", [True, False])
def test_loss_and_gradients_equal_cross_entropy_over_whole_logits(chunk, trainable_head, bias, fast):
    hidden, labels, head = draw(trainable_head, bias)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected = full_cross_entropy(hidden, labels, head)
    expected_gradients = torch.autograd.grad(expected, inputs)

    sums = head_loss(hidden, next_labels(labels), head, chunk, fast=fast)
    gradients = torch.autograd.grad(3 * sums.nll_sum, inputs)

    assert sums.labelled_tokens == 12
    torch.testing.assert_close(sums.nll_sum, expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        evaluated = head_loss(hidden, next_labels(labels), head, chunk, fast=fast)
    assert all(map(torch.equal, evaluated, sums))
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert (gradient / 3 - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("trainable_head", [False, True])
def test_without_labelled_tokens_loss_and_gradient_are_zero(trainable_head):
    hidden, labels, head = draw(trainable_head)
    sums = head_loss(hidden, torch.full_like(labels, -100), head)
    sums.nll_sum.backward()
    assert [value.item() for value in sums] == [0, 0, 0]
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_nothing_is_predicted_across_samples():
    hidden, labels, head = draw()
    labels[10] = -100  # a second sample begins at 10: its first label is never one
    together = head_loss(hidden, next_labels(labels), head)
    first, second = (
        head_loss(hidden[:10], next_labels(labels[:10]), head),
        head_loss(hidden[10:], next_labels(labels[10:]), head),
    )
    torch.testing.assert_close(together.nll_sum, first.nll_sum + second.nll_sum)
    assert together.labelled_tokens == first.labelled_tokens + second.labelled_tokens
    (gradient,) = torch.autograd.grad(together.nll_sum, hidden)
    assert not gradient[9].any()  # the first sample's last token predicts nothing
    assert gradient[10].any()  # label 11 counts, and 10 predicts it


def test_each_token_is_predicted_from_the_one_before_it():
    # the head is the identity, so that token t predicts the index of its largest number
    hidden = 10 * F.one_hot(torch.tensor([1, 2, 3, 0])).float()
    sums = head_loss(hidden, next_labels(torch.tensor([-100, 1, 2, 0])), head=identity_head(4))
    assert sums.correct == 2  # 1 and 2 are right, 3 is not 0
    right = torch.tensor(3.0).add(torch.tensor(10.0).exp()).log() - 10  # -log softmax of the largest
    torch.testing.assert_close(sums.nll_sum, 3 * right + 10)


def identity_head(size):
    head = nn.Linear(size, size, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(size))
    return head


def test_a_hook_on_the_head_is_called():
    hidden, labels, head = draw()
    head.weight.requires_grad_(False)
    doubled = head.register_forward_hook(lambda module, inputs, output: 2 * output)
    loss = head_loss(hidden, next_labels(labels), head).nll_sum
    doubled.remove()
    head.weight.mul_(2)
    torch.testing.assert_close(loss, head_loss(hidden, next_labels(labels), head).nll_sum)


def test_in_float32_the_loss_is_torchs_to_the_last_bit_as_on_the_plain_path(monkeypatch):
    hidden, labels, head = draw()
    sums = head_loss(hidden, next_labels(labels), head)
    (gradient,) = torch.autograd.grad(sums.nll_sum, hidden)
    monkeypatch.setattr(loops, "can_run", lambda *_: False)
    of_torch = head_loss(hidden, next_labels(labels), head)
    assert torch.equal(sums.nll_sum, of_torch.nll_sum)
    assert torch.equal(gradient, *torch.autograd.grad(of_torch.nll_sum, hidden))


@pytest.mark.usefixtures("way")
def test_in_bfloat16_the_sum_is_float32_and_the_gradient_bfloat16():
    hidden, labels, head = draw()
    expected = full_cross_entropy(hidden, labels, head)
    low = hidden.detach().bfloat16().requires_grad_()
    sums = head_loss(low, next_labels(labels), head.bfloat16())
    sums.nll_sum.backward()
    assert sums.nll_sum.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(sums.nll_sum, expected, rtol=1e-2, atol=0)


@pytest.mark.usefixtures("way")
def test_a_factor_on_the_loss_is_not_rounded_to_the_gradients_dtype():
    hidden, labels, head = draw()
    hidden, head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
    (whole,) = torch.autograd.grad(head_loss(hidden, next_labels(labels), head).nll_sum, hidden)
    (third,) = torch.autograd.grad(head_loss(hidden, next_labels(labels), head).nll_sum / 3, hidden)
    assert torch.equal(third, (whole.float() / 3).bfloat16())
    assert not torch.equal(third, whole * torch.tensor(1 / 3).bfloat16())


@pytest.mark.parametrize("vocabulary", [64, 192, 100])
def test_of_equal_logits_the_first_is_the_prediction(vocabulary):
    logits = torch.randint(0, 5, (50, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    first = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    assert loss_module.head_loss(logits, first, identity_head(vocabulary)).correct == 50
    assert loss_module.head_loss(logits, (first + 1) % vocabulary, identity_head(vocabulary)).correct == 0
