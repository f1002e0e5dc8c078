import itertools

import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache

from qlora_lightning.model.kernels import attention as kernel
from qlora_lightning.model.layers.attention import flat_attention, plain_flat_attention, register_flat_attention
from qlora_lightning.model.layout import Needed, place_samples, whole_samples
from qlora_lightning.support.versions import attend_ragged

LENGTHS = (5, 1, 12, 7)
BOUNDS = list(itertools.pairwise(itertools.accumulate(LENGTHS, initial=0)))


def cu_seqlens(*lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def draw_qkv(dtype, device="cpu", head_dim=16):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, sum(LENGTHS), head_dim, generator=generator) for heads in (4, 2, 2)]
    return [tensor.to(device, dtype) for tensor in drawn]


def causal_attention_by_hand(query, key, value):
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))  # two query heads per key head
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_sample_in_a_batch_is_bit_equal_to_its_own_alone(dtype):
    qkv = draw_qkv(dtype)
    together, weights = flat_attention(None, *qkv, None, samples=whole_samples(LENGTHS))
    assert weights is None
    assert together.shape == (1, sum(LENGTHS), 4, 16)
    for start, end in BOUNDS:
        sample = [tensor[:, :, start:end].clone() for tensor in qkv]
        alone, _ = flat_attention(None, *sample, None, samples=whole_samples([end - start]))
        assert torch.equal(together[:, start:end], alone)


def test_attention_is_softmax_of_scaled_products_with_earlier_tokens_of_the_same_sample():
    qkv = draw_qkv(torch.float32)
    together, _ = flat_attention(None, *qkv, None, samples=whole_samples(LENGTHS))
    expected = [causal_attention_by_hand(*(tensor[:, :, start:end] for tensor in qkv)) for start, end in BOUNDS]
    torch.testing.assert_close(together, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)


def test_scaling_replaces_the_default_factor():
    query, key, value = draw_qkv(torch.float32)
    doubled, _ = flat_attention(None, query, key, value, None, scaling=0.5, samples=whole_samples(LENGTHS))
    expected, _ = flat_attention(None, 2 * query, key, value, None, samples=whole_samples(LENGTHS))
    torch.testing.assert_close(doubled, expected)  # 16 ** -0.5 = 0.25


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=register_flat_attention())


def sample_ids():
    return torch.randint(5, 40_000, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def hidden_states(model, ids, lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    arguments = {"samples": whole_samples(lengths), "use_cache": False}
    return model.base_model(input_ids=ids, position_ids=positions, **arguments).last_hidden_state


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float32, 1e-6)])
def test_hidden_states_of_a_sample_in_a_batch_equal_its_own_alone(tiny_base, dtype, tolerance):
    model, ids = load(tiny_base, dtype), sample_ids()
    with torch.no_grad():
        together = hidden_states(model, ids, LENGTHS)
        alone = [hidden_states(model, ids[:, start:end], (end - start,)) for start, end in BOUNDS]
    # in float32 MKL chooses its kernel by the number of rows
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=tolerance, atol=tolerance)


def test_hidden_states_alone_equal_those_of_transformers_own_attention(tiny_base):
    model, ids = load(tiny_base, torch.float32), sample_ids()
    with torch.no_grad():
        ours = hidden_states(model, ids, (sum(LENGTHS),))
        model.set_attn_implementation("eager")
        torch.testing.assert_close(ours, model.base_model(input_ids=ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_samples(tiny_base):
    model, ids = load(tiny_base, torch.float32), sample_ids()
    weights = torch.randn(1, sum(LENGTHS), 64, generator=torch.Generator().manual_seed(2))
    (hidden_states(model, ids, LENGTHS) * weights).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for start, end in BOUNDS:
        (hidden_states(model, ids[:, start:end], (end - start,)) * weights[:, start:end]).sum().backward()
    assert len(together) == 2 * 9 + 2  # layers × (linears and norms), embedding, last norm
    for name, gradient in together.items():
        alone = model.get_parameter(name).grad
        assert (gradient - alone).norm() <= 1e-5 * alone.norm(), name


def test_tokens_behind_a_filled_cache_see_it_and_their_own_past(tiny_base):
    model, ids = load(tiny_base, torch.float32).eval(), sample_ids()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        model(ids[:, :10], None, None, cache)  # by place: its name differs between versions of transformers
        behind = model(ids[:, 10:], None, None, cache).logits
    torch.testing.assert_close(behind, whole[:, 10:], rtol=1e-4, atol=1e-4)


def test_samples_that_only_their_positions_tell_apart_do_not_see_each_other(tiny_base):
    model, ids = load(tiny_base, torch.float32).eval(), sample_ids()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for start, end in BOUNDS:
            alone = model(input_ids=ids[:, start:end], use_cache=False).logits
            torch.testing.assert_close(together[:, start:end], alone, rtol=1e-4, atol=1e-4)


def test_samples_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="samples: expected those of 25 tokens, found 24"):
        flat_attention(None, *draw_qkv(torch.float32), None, samples=whole_samples([24]))


LAYOUTS = {
    "apart": Needed([5, 1, 12, 7], [0, 0, 0, 0], []),
    "a beginning that two share": Needed([8, 1, 12, 7], [3, 0, 0, 0], [2, 0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_padded_samples_in_one_kernel_attend_as_each_alone(needed, dtype, monkeypatch):
    """The way of cards that are older than compute capability 8.0."""
    samples = place_samples(needed, pads=True)
    qkv = [tensor.requires_grad_() for tensor in draw_qkv(dtype)]
    single, _ = plain_flat_attention(None, *qkv, None, samples=samples)
    weights = torch.randn(single.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    of_single = torch.autograd.grad(single, qkv, weights)
    monkeypatch.setattr(kernel, "can_attend", lambda value, dtype: False)
    padded, _ = flat_attention(None, *qkv, None, samples=samples)
    of_padded = torch.autograd.grad(padded, qkv, weights)
    error = 1e-6 if dtype == torch.float32 else 1e-2
    for one, other in zip([padded, *of_padded], [single, *of_single], strict=True):
        assert one.shape == other.shape
        assert (one - other).float().norm() <= error * other.float().norm()


def test_left_padded_generation_equals_generation_alone(tiny_base):
    model = load(tiny_base, torch.float32).eval()
    prompts = [sample_ids()[0, start:end] for start, end in BOUNDS]
    longest = max(LENGTHS)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    ids = torch.stack([torch.cat([torch.full((longest - len(p),), 2), p]) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, longest:]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)
        assert alone[0, len(prompt) :].tolist() == answer.tolist()


def by_token(tensors):
    return [tensor[0].transpose(0, 1) for tensor in tensors]


def test_the_installed_torch_s_ragged_kernel_takes_grouped_heads_as_they_are_given():
    qkv = [tensor.to("meta").requires_grad_() for tensor in by_token(draw_qkv(torch.bfloat16, head_dim=64))]
    mixed = attend_ragged(*qkv, cu_seqlens(*LENGTHS, device="meta"), max(LENGTHS), None)
    assert mixed.shape == (sum(LENGTHS), 4, 64)
    assert [gradient.shape[1] for gradient in torch.autograd.grad(mixed.sum(), qkv)] == [4, 2, 2]


def ragged_kernel_of_torch_2_13(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    assert window_size == (-1, 0)
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k == max(LENGTHS)
    of_samples = [
        scaled_dot_product_attention(
            *(tensor[start:end].transpose(0, 1) for tensor in (query, key, value)),
            is_causal=True,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        for start, end in itertools.pairwise(cu_q.tolist())
    ]
    return torch.cat(of_samples, dim=1).transpose(0, 1)


def ragged_kernel_of_torch_2_11(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    options = {"scale": scale, "window_size": window_size, "enable_gqa": False}
    return ragged_kernel_of_torch_2_13(query, key, value, cu_q, cu_k, max_q, max_k, **options)


@pytest.mark.parametrize("kernel", [ragged_kernel_of_torch_2_11, ragged_kernel_of_torch_2_13])
def test_what_a_ragged_kernel_is_given_makes_it_flat_attention(monkeypatch, kernel):
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    qkv, bounds = draw_qkv(torch.float32), cu_seqlens(*LENGTHS)
    expected, _ = flat_attention(None, *qkv, None, scaling=0.3, samples=whole_samples(LENGTHS))
    ragged = attend_ragged(*by_token(qkv), bounds, max(LENGTHS), 0.3)
    torch.testing.assert_close(ragged[None], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_ragged_kernel_equals_attention_sample_by_sample():
    qkv = [tensor.requires_grad_() for tensor in draw_qkv(torch.bfloat16, "cuda", head_dim=64)]
    samples = whole_samples(LENGTHS).to(torch.device("cuda"))
    ragged, _ = flat_attention(None, *qkv, None, samples=samples)
    ragged_gradients = torch.autograd.grad(ragged.float().square().sum(), qkv)
    single, _ = plain_flat_attention(None, *qkv, None, samples=samples)
    single_gradients = torch.autograd.grad(single.float().square().sum(), qkv)
    torch.testing.assert_close(ragged, single, rtol=1e-2, atol=1e-2)
    for gradient, expected in zip(ragged_gradients, single_gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-2 * expected.norm()
