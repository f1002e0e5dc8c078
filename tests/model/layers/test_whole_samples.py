import torch

from qlora_lightning.model.layers.attention import lay_out_samples, sort_by_place

PLACES = torch.tensor([1, 2, 0, 1, 2, 3])  # two samples of three tokens, which begin alike


def test_tokens_are_sorted_by_place_those_of_one_place_in_their_order():
    order, begins = sort_by_place(PLACES, 4)
    assert order.tolist() == [2, 0, 3, 1, 4, 5]
    assert begins.tolist() == [0, 1, 3, 5]


def test_a_state_is_laid_out_for_each_of_its_tokens_and_sums_their_gradients():
    states = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    whole = lay_out_samples(states, PLACES, *sort_by_place(PLACES, 4))
    assert torch.equal(whole, states[:, :, PLACES])
    grad = torch.randn(whole.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(each, states, grad)[0] for each in (whole, states[:, :, PLACES]))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_are_summed_up_in_float32():
    """256 and seven times 1: in bfloat16 every sum would stay 256."""
    states, places = (
        torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(8, dtype=torch.int64),
    )
    whole = lay_out_samples(states, places, *sort_by_place(places, 1))
    grad = torch.ones_like(whole)
    grad[:, :, 0] = 256
    whole.backward(grad)
    assert states.grad.flatten().tolist() == [264.0, 264.0]  # 263, rounded once
