"""Fused layers compute what those of PEFT and transformers do, and only where nobody would miss these."""

import functools
import re
import shutil

import bitsandbytes as bnb
import lightning
import peft
import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoTokenizer
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.cpu import library
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, cast_adapters
from qlora_lightning.model.layers.fuse import explain_plain_layers, fuse_layers
from qlora_lightning.model.layers.lora import FusedLinear, FusedLinear4bit, runs_fused
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests.random_base import save_random_llama
from tests.steps import assert_same_step, distance, loss_and_gradients, make_batch, make_module, make_trainer, randomize

LENGTHS = (9, 1, 30, 17)


def batch():
    return make_batch(LENGTHS)


def layers_of(module):
    return list(module.causal_lm.base_model.layers)


def count_fused(module):
    """Count the layers that run fused, once a loss has been computed outside of a Trainer."""
    module.compute_loss(batch())
    return sum(map(runs_fused, layers_of(module)))


# ---- fused = plain --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "none"},
        {"target_modules": ["q_proj", "v_proj"], "quantization": "none"},
        {"target_modules": ["down_proj", "k_proj"]},
        {"layers": "last:1"},
        # below the adapter nothing takes a gradient: not each function has one to give for its input
        *({"target_modules": [name], "layers": "last:1"} for name in ("down_proj", "gate_proj", "up_proj", "o_proj")),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_plain_path(tiny_base, options):
    fast, plain = (make_module(tiny_base, fast=fast, **options) for fast in (True, False))
    assert_same_step(loss_and_gradients(fast), loss_and_gradients(plain))
    assert all(map(runs_fused, layers_of(fast)))
    assert not any(isinstance(layer, FusedDecoderLayer) for layer in layers_of(plain))


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_with_and_without_a_compiler_it_errs_no_more_than_the_plain_path(
    tiny_base, monkeypatch, compute_dtype, compiler
):
    exact, plain = (
        loss_and_gradients(make_module(tiny_base, fast=False, compute_dtype=dtype)) for dtype in ("fp32", compute_dtype)
    )
    if not compiler:
        library.load_library.cache_clear()
        monkeypatch.setattr(shutil, "which", lambda name: None)
    fast = loss_and_gradients(make_module(tiny_base, compute_dtype=compute_dtype))
    if not compiler:
        library.load_library.cache_clear()
    assert 0 < distance(fast[1], exact[1]) <= max(1e-5, 1.1 * distance(plain[1], exact[1]))
    assert fast[0] == pytest.approx(exact[0], rel=1e-5 if compute_dtype == "fp32" else 1e-3)


@pytest.mark.parametrize("half", [".lora_A.", ".lora_B."])
def test_an_adapter_half_of_which_is_frozen_has_the_gradients_of_the_plain_path(tiny_base, half):
    modules = [make_module(tiny_base, fast=fast) for fast in (True, False)]
    for module in modules:
        for name, tensor in module.named_parameters():
            tensor.requires_grad_(half in name)
    assert_same_step(*map(loss_and_gradients, modules))


def test_biases_of_a_base_are_added(tmp_path, tiny_base):
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    save_random_llama(tmp_path, torch.float32, hidden_size=32, intermediate_size=64, attention_bias=True, mlp_bias=True)
    tensors = load_file(tmp_path / "model.safetensors")
    biases = {name: torch.randn_like(tensor) for name, tensor in tensors.items() if name.endswith("bias")}
    save_file({**tensors, **biases}, tmp_path / "model.safetensors", {"format": "pt"})
    fast, plain = (make_module(tmp_path, fast=fast, quantization="none", rank=3) for fast in (True, False))
    assert_same_step(*map(loss_and_gradients, (fast, plain)))
    assert all(map(runs_fused, layers_of(fast)))


def test_under_autocast_of_the_user_and_with_the_adapter_off_it_computes_as_the_plain_path(tiny_base):
    module, plain = make_module(tiny_base), make_module(tiny_base, fast=False)
    exact = loss_and_gradients(plain)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(module)
    assert loss == pytest.approx(exact[0], abs=0.05)
    assert 0 < distance(gradients, exact[1]) < 0.1
    with torch.no_grad(), module.model.disable_adapter(), plain.model.disable_adapter():
        ours, theirs = (each.compute_loss(batch()).nll_sum for each in (module, plain))
    torch.testing.assert_close(ours, theirs)


# ---- a linear alone -------------------------------------------------------------------------------------------------

IN, OUT = 64, 48


def make_linear(storage, bias):
    """A LoRA linear of PEFT over a frozen one, inside a model."""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias)
    linear = nn.Linear(IN, OUT, bias=bias)
    if storage != "none":
        linear = bnb.nn.Linear4bit(IN, OUT, bias=bias, quant_type=storage, compute_dtype=torch.float32)
    linear.load_state_dict(plain.state_dict())
    base = nn.ModuleDict({"proj": linear}).requires_grad_(False).to("cpu")  # quantizes
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = storage != "none", False
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["proj"]))
    return randomize(model, std=0.3), model.base_model.model["proj"]


@pytest.mark.parametrize(("storage", "bias"), [("none", True), ("nf4", False), ("nf4", True), ("fp4", False)])
def test_a_linear_gives_the_outputs_and_gradients_of_pefts_own(storage, bias):
    found = []
    for fast in (False, True):
        model, layer = make_linear(storage, bias)
        assert not fast or fuse_layers(model) == []
        x = torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(2), requires_grad=True)
        output = layer(x)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        found.append([output, *torch.autograd.grad(output.sin().sum(), [x, *weights])])
    assert type(layer) is (FusedLinear if storage == "none" else FusedLinear4bit)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert layer(x[:, :0]).shape == (2, 0, OUT)


# ---- what is kept, and computed again -------------------------------------------------------------------------------


@pytest.mark.parametrize(("checkpoints", "casts"), [(False, True), (True, True)])
def test_checkpointed_layers_and_adapters_that_are_cast_at_once_give_the_same_numbers(tiny_base, checkpoints, casts):
    module = make_module(tiny_base, compute_dtype="bf16")
    loss, gradients = loss_and_gradients(module)
    if checkpoints:
        enable_activation_checkpointing(module.causal_lm)
    if casts:  # as on a GPU, where each cast of its own would be a launch
        options = {"casts": cast_adapters(module.model)}
        module.causal_lm.base_model.register_forward_pre_hook(
            lambda _, args, usual: (args, usual | options), with_kwargs=True
        )
    again = loss_and_gradients(module)
    assert again[0] == loss
    assert torch.equal(again[1], gradients)


@pytest.mark.parametrize("name", ["down_proj.lora_A", "down_proj.lora_B", "gate_proj.lora_A"])
def test_an_adapter_that_is_changed_between_forward_and_backward_is_refused(tiny_base, name):
    module = make_module(tiny_base)
    sums = module.compute_loss(batch())
    with torch.no_grad():
        next(tensor for each, tensor in trainable_tensors(module).items() if name in each).add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        sums.nll_sum.backward()


# ---- whatever changes between two runs ------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    def forward(self, x):
        return x


def hook(part):
    return lambda layer: layer.get_submodule(part).register_forward_hook(lambda *inputs: 2 * inputs[-1])


def double(part):
    def change(layer):
        usual = layer.get_submodule(part).forward
        layer.get_submodule(part).forward = lambda *inputs: 2 * usual(*inputs)

    return change


WATCHED = ("mlp", "self_attn.k_proj.lora_A.default", "mlp.gate_proj.base_layer")
CHANGES = {
    "a norm": lambda layer: setattr(layer, "input_layernorm", OwnNorm()),
    "an activation": lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
    "an MLP": lambda layer: setattr(layer, "mlp", OwnNorm()),
    "dropout": lambda layer: layer.mlp.up_proj.lora_dropout.update({"default": nn.Dropout(0.5)}),
    **{f"a hook on {part}": hook(part) for part in (*WATCHED, "mlp.down_proj.lora_dropout.default")},
    **{f"the forward of {part}": double(part) for part in WATCHED},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_part_that_is_replaced_or_watched_after_a_step_is_called_in_the_next(tiny_base, change):
    losses = []
    for fast in (True, False):
        module = make_module(tiny_base, quantization="none", fast=fast)
        before = loss_and_gradients(module, batch())[0]
        change(layers_of(module)[0])
        torch.manual_seed(0)
        losses.append(loss_and_gradients(module, batch())[0])
        assert sum(map(runs_fused, layers_of(module))) == fast
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(before, rel=1e-5)


def test_a_base_that_trains_and_another_class_of_a_part_are_not_fused(tiny_base, monkeypatch):
    module = make_module(tiny_base, quantization="none")
    layers_of(module)[0].self_attn.q_proj.get_base_layer().weight.requires_grad_()
    assert count_fused(module) == 1
    monkeypatch.setattr(llama, "LlamaRMSNorm", type("OwnNorm", (llama.LlamaRMSNorm,), {}))
    assert count_fused(make_module(tiny_base)) == 0


def test_who_watches_all_modules_sees_each(tiny_base):
    module, seen = make_module(tiny_base), set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(type(module)))
    assert count_fused(module) == 0
    handle.remove()
    assert {llama.LlamaRMSNorm, llama.LlamaMLP, nn.Linear} <= seen
    assert count_fused(module) == 2


def test_what_is_replaced_for_all_models_is_called(tiny_base, monkeypatch):
    module, called = make_module(tiny_base), []
    kinds = (llama.LlamaMLP, llama.LlamaRMSNorm, SiLUActivation, bnb.nn.Linear4bit)
    replaced = [*((kind, "forward") for kind in kinds), (llama, "apply_rotary_pos_emb")]
    for owner, name in replaced:
        usual = getattr(owner, name)

        @functools.wraps(usual)
        def call(*args, usual=usual, owner=owner, **options):
            called.append(owner)
            return usual(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            assert count_fused(module) == 0
        assert called[-1] is owner
        assert count_fused(module) == 2


def add_dora(model):
    model.add_adapter("d", peft.LoraConfig(r=2, use_dora=True, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("d")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_magnitude_vector["d"].weight.data *= 1.5


def add_second(model):
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])


@pytest.mark.parametrize("change", [add_dora, add_second, lambda model: model.merge_adapter()])
def test_adapters_that_are_switched_and_merged_count_at_once(tiny_base, change):
    found = []
    for fast in (True, False):
        module = make_module(tiny_base, fast=fast, quantization="none").eval()
        module.choose_layers()
        torch.manual_seed(0)
        change(module.model)
        with torch.no_grad():
            found.append(module.compute_loss(batch()).nll_sum)
        found.append(module.answer([[5, 6, 7, 8], [9, 10]], [1], 8))
        found.append(module.model(input_ids=torch.arange(5, 30)[None]).logits.detach())
    for ours, plain in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(ours, plain)


def test_who_hooks_before_an_answer_or_a_call_of_the_model_sees_it(tiny_base):
    module, seen = make_module(tiny_base), []
    module.compute_loss(batch())
    module.answer([[5, 6]], [1], 2)
    part = layers_of(module)[0].self_attn
    part.q_proj.lora_B.default.register_forward_hook(lambda *_: seen.append("B"))
    module.model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == ["B"]
    part.register_forward_hook(lambda *_: seen.append("attention"))
    module.answer([[5, 6, 7]], [1], 1)
    assert seen == ["B", "B", "attention"]


# ---- in a fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Fit some steps with a validation behind each."""

    def run(callback=None, max_steps=2, profiler=None, **settings):
        lightning.seed_everything(0, verbose=False)
        settings = {"rank": 2, "compute_dtype": "fp32", "quantization": "none", "learning_rate": 1e-2, **settings}
        options = {"max_steps": max_steps, "val_check_interval": 1, "limit_val_batches": 1}
        trainer = make_trainer(tmp_path, callbacks=callback, profiler=profiler, **options)
        rows = str(rows_file)
        data = InstructionDataModule(train=rows, val=rows, tokenizer=str(tiny_base), batch_size=2)
        trainer.fit(QLoRAModule(str(tiny_base), warmup_ratio=0.0, **settings), data)

    return run


class Changing(lightning.Callback):
    """Changes all layers at some hook, once, and notes the losses."""

    def __init__(self, at, change):
        self.losses, self.changes = [], [change]
        setattr(self, at, self.change_layers)

    def change_layers(self, trainer, module, *_):
        while self.changes:
            list(map(self.changes.pop(), layers_of(module)))

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


@pytest.mark.parametrize(
    ("at", "change"), [("on_validation_end", double("mlp")), ("on_train_batch_start", hook("mlp"))]
)
def test_what_a_callback_changes_at_any_time_holds_in_training(fit, at, change):
    ours, plain = (Changing(at, change) for _ in range(2))
    fit(ours)
    fit(plain, fast=False)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)


def test_a_profile_of_pytorch_names_the_parts_of_a_step(fit, tmp_path):
    always = {"schedule": lambda step: torch.profiler.ProfilerAction.RECORD}
    profiler = PyTorchProfiler(tmp_path, "profile", row_limit=-1, export_to_chrome=False, **always)
    fit(profiler=profiler, quantization="nf4")
    table = (tmp_path / "fit-profile.txt").read_text()
    rows = [line.split() for line in table.splitlines() if "% " in line and "# of" not in line]
    found, steps = {row[0]: int(row[-1]) for row in rows}, 2
    for name in ("NormedQKV", "Rotary", "SampleAttention", "LoRALinearFunction", "NormedGateUp", "SwiGLUProjection"):
        assert found[f"{name}Backward"] == 2 * steps <= found[name]  # in two layers; validation has forwards too
    assert found["_FrozenHeadLossBackward"] == steps <= found["_FrozenHeadLoss"]
    assert found["bitsandbytes::dequantize_4bit"] >= 2 * 2 * 7 * steps
    assert "Optimizer.step#AdamW.step" in found


# ---- why layers are plain -------------------------------------------------------------------------------------------


def explain(module, precision="32-true"):
    module.compute_loss(batch())
    return explain_plain_layers(module.causal_lm, autocasts=module.autocast_dtype is not None, precision=precision)


def test_a_fit_reports_why_layers_are_plain_if_they_are(fit, capsys):
    fit(max_steps=1)
    fit(max_steps=1, fast=False)
    assert "slower layers" not in capsys.readouterr().out
    fit(max_steps=1, dropout=0.1)
    assert "All 2 layers train by the slower layers of PEFT and transformers: model.dropout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compute_dtype": "bf16", "dropout": 0.1}, "All 2 layers .*: model.dropout is not 0"),
        ({"lora_options": {"use_dora": True}}, "All 2 layers .*: model.lora_options ask for PEFT's .*Dora"),
        ({"quantization": "int8"}, "All 2 layers .*: model.quantization is int8"),
        ({"compute_dtype": "bf16", "lora_options": {"trainable_token_indices": [5]}}, "token_adapter.* beside"),
        ({"compute_dtype": "bf16", "lora_options": {"modules_to_save": ["norm"]}}, r"norm\..* beside the adapters"),
    ],
)
def test_the_reason_is_named_by_its_setting(tiny_base, options, reason):
    assert re.search(reason, explain(make_module(tiny_base, **options)))


def test_the_precision_hooks_and_the_base_are_named_too(tiny_base):
    module = make_module(tiny_base)
    assert re.search("trainer.precision is bf16-mixed .32-true computes", explain(module, "bf16-mixed"))
    layers_of(module)[1].mlp.register_forward_hook(lambda *_: None)
    assert explain(module).startswith("1 of 2 layers train")
    for layer in layers_of(module):
        layer.mlp.act_fn, layer.self_attn.attention_dropout = nn.GELU(), 0.25
    module.causal_lm.config.update({"hidden_act": "gelu", "attention_dropout": 0.25})
    assert re.search("attention_dropout is 0.25; the base's hidden_act is gelu, not silu", explain(module))
