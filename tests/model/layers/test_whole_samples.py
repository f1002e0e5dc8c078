import torch

from qlora_lightning.model.layers.attention import lay_out_states
from qlora_lightning.model.layout import Needed, place_samples

SPREAD = place_samples(Needed([3, 3], [2, 0], [1, 0])).whole  # two samples of three tokens, which begin alike


def test_a_state_is_laid_out_for_each_of_its_tokens_and_sums_their_gradients():
    states = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    whole = lay_out_states(states, SPREAD)
    assert torch.equal(whole, states[:, :, SPREAD.places])
    grad = torch.randn(whole.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(each, states, grad)[0] for each in (whole, states[:, :, SPREAD.places]))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_are_summed_up_in_float32():
    """256 and seven times 1: in bfloat16 every sum would stay 256."""
    states = torch.zeros(1, 1, 8, 2, dtype=torch.bfloat16, requires_grad=True)
    # eight samples that begin with the same token
    spread = place_samples(Needed([2] * 8, [0, *[1] * 7], list(range(8)))).whole
    whole = lay_out_states(states[:, :, :1].expand(-1, -1, 9, -1), spread)
    grad = torch.zeros_like(whole)
    grad[:, :, ::2] = 1
    grad[:, :, 0] = 256
    whole.backward(grad)
    assert states.grad[0, 0, 0].tolist() == [264.0, 264.0]  # 263, rounded once
