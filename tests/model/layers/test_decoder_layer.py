import functools
import itertools
import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.kernels import loops, thin
from qlora_lightning.model.layers import elementwise
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, cast_adapters
from qlora_lightning.model.layers.fusing import fuse_layers
from qlora_lightning.model.layers.lora import FrozenWeight
from qlora_lightning.model.layout import IGNORED
from qlora_lightning.support.versions import enable_activation_checkpointing

LENGTHS = (9, 1, 30, 17)


def make(tiny_base, fast, compute_dtype="fp32", device="cpu", **options):
    """A module whose adapters are random, not zero, and the same in each."""
    module = QLoRAModule(str(tiny_base), compute_dtype=compute_dtype, rank=4, fast=fast, **options).to(device)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trainable_tensors(module).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return module


def batch(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40_000, (1, sum(lengths)), generator=generator)
    labels, bounds = ids.clone(), [0, *itertools.accumulate(lengths)]
    labels[0, bounds[:-1]] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "longest": max(lengths),
    }


def loss_and_gradients(module):
    inputs = {name: each if isinstance(each, int) else each.to(module.device) for name, each in batch().items()}
    sums = module.compute_loss(inputs)
    loss = sums.nll_sum / sums.labelled_tokens
    loss.backward()
    trainable = trainable_tensors(module)
    gradients = torch.cat([tensor.grad.flatten().cpu() for tensor in trainable.values()])
    for tensor in trainable.values():
        tensor.grad = None
    return float(loss.detach()), gradients


def distance(one, other):
    return float((one - other).norm() / other.norm())


def layers_of(module):
    return list(module.causal_lm.base_model.layers)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["down_proj", "k_proj"]}, {"layers": "last:1"}],
)
def test_loss_and_gradients_equal_those_of_the_plain_path(tiny_base, quantization, options):
    fast, plain = (make(tiny_base, fast, quantization=quantization, **options) for fast in (True, False))
    assert {type(layer) for layer in layers_of(fast)} == {FusedDecoderLayer}
    assert FusedDecoderLayer not in {type(layer) for layer in layers_of(plain)}
    loss, gradients = loss_and_gradients(fast)
    expected_loss, expected_gradients = loss_and_gradients(plain)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(gradients, expected_gradients) <= 1e-5


def test_with_gradient_checkpointing_they_are_the_same_numbers(tiny_base):
    module = make(tiny_base, fast=True)
    expected = loss_and_gradients(module)
    enable_activation_checkpointing(module.causal_lm)
    loss, gradients = loss_and_gradients(module)
    assert loss == expected[0]
    assert torch.equal(gradients, expected[1])


def test_a_checkpointed_layer_runs_again_up_to_its_last_product(tiny_base, monkeypatch):
    module = make(tiny_base, fast=True)
    enable_activation_checkpointing(module.causal_lm)
    ran = []
    multiply = FrozenWeight.multiply
    monkeypatch.setattr(FrozenWeight, "multiply", lambda *inputs: ran.append(1) or multiply(*inputs))
    loss_and_gradients(module)
    assert len(ran) == len(layers_of(module)) * (7 + 6) + 1  # the head's


def test_a_layer_that_runs_again_stops_before_swiglu(tiny_base, monkeypatch):
    module = make(tiny_base, fast=True)
    enable_activation_checkpointing(module.causal_lm)
    ran = []
    silu = elementwise.F.silu
    monkeypatch.setattr(loops, "can_run", lambda *_: False)
    monkeypatch.setattr(elementwise.F, "silu", lambda gate: ran.append(1) or silu(gate))
    loss_and_gradients(module)
    assert len(ran) == len(layers_of(module)) * 2  # forward, and once for backward


def test_in_bfloat16_it_errs_no_more_than_the_plain_path(tiny_base):
    exact_loss, exact = loss_and_gradients(make(tiny_base, fast=False))
    fast_loss, fast = loss_and_gradients(make(tiny_base, fast=True, compute_dtype="bf16"))
    plain_loss, plain = loss_and_gradients(make(tiny_base, fast=False, compute_dtype="bf16"))
    assert 0 < distance(fast, exact) <= 1.1 * distance(plain, exact)
    assert abs(fast_loss - exact_loss) <= abs(plain_loss - exact_loss) + 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its own compiler does
def test_compiled_it_gives_the_same_gradients(tiny_base):
    module = make(tiny_base, fast=True)
    loss, gradients = loss_and_gradients(module)
    module.zero_grad()
    module.causal_lm.base_model.compile(backend="eager")
    compiled_loss, compiled = loss_and_gradients(module)
    torch._dynamo.reset()
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert distance(compiled, gradients) <= 1e-5


@pytest.mark.parametrize("name", ["down_proj.lora_A", "down_proj.lora_B", "gate_proj.lora_A"])
def test_an_adapter_that_is_changed_between_forward_and_backward_is_refused(tiny_base, name):
    module = make(tiny_base, fast=True)
    sums = module.compute_loss(batch())
    with torch.no_grad():
        next(tensor for each, tensor in trainable_tensors(module).items() if name in each).add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        sums.nll_sum.backward()


@pytest.mark.gpu
def test_on_cuda_in_bfloat16_it_errs_no_more_than_the_plain_path(tiny_base):
    exact_loss, exact = loss_and_gradients(make(tiny_base, fast=False))
    fast_loss, fast = loss_and_gradients(make(tiny_base, fast=True, compute_dtype="bf16", device="cuda"))
    _, plain = loss_and_gradients(make(tiny_base, fast=False, compute_dtype="bf16", device="cuda"))
    assert 0 < distance(fast, exact) <= 1.1 * distance(plain, exact)
    assert fast_loss == pytest.approx(exact_loss, abs=0.05)


def test_a_sample_in_a_batch_has_the_hidden_states_that_it_has_alone(tiny_base):
    module = make(tiny_base, fast=True, compute_dtype="bf16")

    def hidden(inputs):
        inputs = {name: inputs[name] for name in ("input_ids", "position_ids", "cu_seqlens")}
        return module.causal_lm.base_model(**inputs, use_cache=False).last_hidden_state

    together = hidden(whole := batch())
    for start, end in itertools.pairwise(whole["cu_seqlens"].tolist()):
        alone = batch((end - start,)) | {"input_ids": whole["input_ids"][:, start:end]}
        assert torch.equal(hidden(alone), together[:, start:end])


def count_plain_calls(module, monkeypatch):
    fused = []
    asked = FusedDecoderLayer._fuses
    with monkeypatch.context() as patch:
        patch.setattr(FusedDecoderLayer, "_fuses", lambda *inputs: fused.append(asked(*inputs)) or fused[-1])
        module.compute_loss(batch())
    return fused.count(False)


@pytest.mark.parametrize("part", ["mlp.up_proj", "self_attn.q_proj.lora_A.default", "mlp.down_proj.base_layer"])
def test_hooks_on_skipped_parts_are_called(tiny_base, monkeypatch, part):
    module, seen = make(tiny_base, fast=True), []
    layers_of(module)[1].get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    assert count_plain_calls(module, monkeypatch) == 1  # of two layers
    assert seen == [part]


def test_parts_that_are_replaced_after_loading_are_used(tiny_base, monkeypatch):
    class OwnNorm(nn.Module):
        def forward(self, x):
            return x

    def replace_forward(layer):
        layer.mlp.forward = lambda x: x

    for change in (
        replace_forward,
        lambda layer: setattr(layer, "input_layernorm", OwnNorm()),
        lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        lambda layer: layer.self_attn.q_proj.get_base_layer().weight.requires_grad_(),
    ):
        module = make(tiny_base, fast=True, quantization="none")
        change(layers_of(module)[0])
        assert count_plain_calls(module, monkeypatch) == 1


@pytest.mark.parametrize("part", ["lora_A.default", "lora_B.default", "lora_dropout.default", "base_layer"])
@pytest.mark.parametrize("linear", ["self_attn.k_proj", "mlp.down_proj"])
def test_a_forward_put_inside_a_linear_is_called(tiny_base, monkeypatch, linear, part):
    module, called = make(tiny_base, fast=True), []
    inner = layers_of(module)[0].get_submodule(f"{linear}.{part}")
    usual = inner.forward
    inner.forward = lambda *inputs: called.append(part) or usual(*inputs)
    assert count_plain_calls(module, monkeypatch) == 1
    assert called == [part]


def test_dropout_that_is_put_where_none_was_drops(tiny_base, monkeypatch):
    module = make(tiny_base, fast=True)
    layers_of(module)[0].mlp.up_proj.lora_dropout["default"] = nn.Dropout(0.5)
    assert count_plain_calls(module, monkeypatch) == 1
    module.eval()
    assert count_plain_calls(module, monkeypatch) == 0
    layers_of(module)[0].mlp.up_proj.lora_dropout["default"].train()
    assert count_plain_calls(module, monkeypatch) == 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((kind, "forward") for kind in (llama.LlamaDecoderLayer, llama.LlamaAttention)),
        *((kind, "forward") for kind in (llama.LlamaMLP, llama.LlamaRMSNorm, SiLUActivation, nn.Linear)),
        (bnb.nn.Linear4bit, "forward"),
        (llama, "apply_rotary_pos_emb"),
        (llama, "rotate_half"),
    ],
)
def test_what_is_replaced_for_all_models_is_called(tiny_base, monkeypatch, owner, name):
    module, called = make(tiny_base, fast=True), []
    usual = getattr(owner, name)

    @functools.wraps(usual)
    def replaced(*args, **kwargs):
        called.append(name)
        return usual(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replaced)
        assert count_plain_calls(module, monkeypatch) == 2
    assert called
    assert count_plain_calls(module, monkeypatch) == 0


def test_a_class_that_is_replaced_before_the_base_is_made_keeps_its_forward(tiny_base, monkeypatch):
    class OwnNorm(llama.LlamaRMSNorm):
        pass

    monkeypatch.setattr(llama, "LlamaRMSNorm", OwnNorm)
    module = make(tiny_base, fast=True)
    assert not any(isinstance(layer, FusedDecoderLayer) for layer in layers_of(module))


@pytest.mark.parametrize("name", ["silu", "swish"])
def test_both_names_of_silu_run_fused(tiny_base, tmp_path, name, monkeypatch):
    shutil.copytree(tiny_base, base := tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": name}))
    fast, plain = make(base, fast=True), make(base, fast=False)
    assert count_plain_calls(fast, monkeypatch) == 0
    assert distance(loss_and_gradients(fast)[1], loss_and_gradients(plain)[1]) <= 1e-5


def test_another_attention_is_called(tiny_base, monkeypatch):
    module = make(tiny_base, fast=True)
    module.causal_lm.set_attn_implementation(register_flat_attention(fast=False))
    assert count_plain_calls(module, monkeypatch) == 2


def test_under_autocast_of_the_user_it_trains(tiny_base):
    module = make(tiny_base, fast=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(module)
    exact_loss, exact = loss_and_gradients(module)
    assert loss == pytest.approx(exact_loss, abs=0.05)
    assert 0 < distance(gradients, exact) < 0.1


def test_a_disabled_adapter_takes_no_part(tiny_base):
    module, plain = make(tiny_base, fast=True), make(tiny_base, fast=False)
    with torch.no_grad(), module.model.disable_adapter(), plain.model.disable_adapter():
        ours, theirs = (each.compute_loss(batch()).nll_sum for each in (module, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"lora_options": {"use_dora": True}}, {"quantization": "int8"}])
def test_what_cannot_be_fused_takes_the_plain_way(tiny_base, monkeypatch, options):
    assert count_plain_calls(make(tiny_base, fast=True, **options), monkeypatch) == 2


def test_a_layer_with_another_part_keeps_its_own_forward(tiny_base, monkeypatch):
    class Gated(nn.SiLU):
        pass

    module = make(tiny_base, fast=False)
    layer = layers_of(module)[0]
    layer.mlp.act_fn = Gated()
    fuse_layers(module)
    assert [type(each) is FusedDecoderLayer for each in layers_of(module)] == [False, True]


def test_below_the_lowest_adapter_nothing_is_kept_for_backward(tiny_base):
    module, kept = make(tiny_base, fast=True, layers="last:1"), []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    first, _ = layers_of(module)
    first.register_forward_hook(lambda *_: kept.append("first ends"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.compute_loss(batch())
    assert kept.index("first ends") == 0
    assert len(kept) > 1


@pytest.mark.parametrize(
    ("targets", "layers", "products", "activations"),
    [
        (["down_proj"], "last:1", 0, 0),
        (["gate_proj"], "last:1", 1, 1),  # of down
        (["up_proj"], "last:1", 1, 0),
        (["o_proj"], "last:1", 3, 1),  # of down, gate and up
        (["k_proj"], "last:1", 4, 1),  # and of o
        ("all-linear", "last:1", 4, 1),
        ("all-linear", "all", 7 + 4, 2),
        (["down_proj"], "all", 7, 1),
    ],
)
def test_only_gradients_that_something_needs_are_computed(
    tiny_base, monkeypatch, targets, layers, products, activations
):
    fast, plain = (make(tiny_base, fast=fast, target_modules=targets, layers=layers) for fast in (True, False))
    made = []
    multiply = FrozenWeight.multiply_back
    monkeypatch.setattr(loops, "can_run", lambda *_: False)
    with monkeypatch.context() as patch, Count(torch.ops.aten.silu_backward.default) as silu:
        patch.setattr(
            FrozenWeight, "multiply_back", lambda *args, **kwargs: made.append(1) or multiply(*args, **kwargs)
        )
        loss, gradients = loss_and_gradients(fast)
    assert (len(made), silu.calls) == (products + 1, activations)  # and the head's
    expected_loss, expected = loss_and_gradients(plain)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(gradients, expected) <= 1e-5


def test_an_adapter_half_of_which_is_frozen_has_the_gradients_of_the_plain_path(tiny_base):
    for half in (".lora_A.", ".lora_B."):
        fast, plain = (make(tiny_base, fast=fast) for fast in (True, False))
        for module in (fast, plain):
            for name, tensor in module.named_parameters():
                tensor.requires_grad_(half in name)
        assert distance(loss_and_gradients(fast)[1], loss_and_gradients(plain)[1]) <= 1e-5


class Count(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.calls = operator, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.operator
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("every_n_layers", [0, 1])
def test_adapters_that_are_cast_at_once_compute_the_same(tiny_base, monkeypatch, every_n_layers):
    """As on a GPU, where each cast of its own would be a launch."""
    module = make(tiny_base, fast=True, compute_dtype="bf16")
    if every_n_layers:
        enable_activation_checkpointing(module.causal_lm)
    monkeypatch.setattr(thin, "can_narrow", lambda *_: False)
    with Count(torch.ops.aten._to_copy.default) as before:
        loss, gradients = loss_and_gradients(module)
    base_model = module.causal_lm.base_model
    usual = base_model.forward
    casts = cast_adapters(module.model, torch.bfloat16)
    monkeypatch.setattr(base_model, "forward", lambda *args, **kwargs: usual(*args, **{**kwargs, "casts": casts}))
    with Count(torch.ops.aten._to_copy.default) as copies:
        again, with_casts = loss_and_gradients(module)
    assert again == loss
    assert torch.equal(with_casts, gradients)
    assert copies.calls <= before.calls - 2 * 2 * 10  # two layers, both ways; the A of q, k, v were stacked already
