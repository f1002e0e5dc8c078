import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora_lightning.model.layers.elementwise import Rotary


def test_output_and_gradient_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    states = torch.randn(1, 3, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(1, 3, 5, 8, generator=generator, dtype=torch.float64)
    keys = states[:, :2]
    expected, turned = apply_rotary_pos_emb(states, keys, cos, sin), Rotary.apply(states, keys, cos, sin)
    torch.testing.assert_close(turned, expected)
    ours, theirs = (
        torch.autograd.grad((query * weights).sum() + (key * weights[:, 1:]).sum(), states)
        for query, key in (turned, expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_it_keeps_the_layout_in_memory():
    states = torch.randn(1, 5, 3, 8).transpose(1, 2)
    turned, _ = Rotary.apply(states, states, torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    assert torch.equal(turned, states)
    assert turned.stride() == states.stride()
