"""Fused layers compute what those of PEFT and transformers do, and only where nobody would miss these."""

import functools
import itertools
import re
import shutil

import bitsandbytes as bnb
import lightning
import peft
import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.adapters.lora import add_adapters, trainable_tensors
from qlora_lightning.model.base_model import freeze
from qlora_lightning.model.kernels import library
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, cast_adapters
from qlora_lightning.model.layers.fusing import choose_layers, explain_plain_layers, fuse_layers
from qlora_lightning.model.layers.lora import FusedLinear4bit, runs_fused
from qlora_lightning.model.layout import whole_samples
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests.steps import assert_same_step, distance, loss_and_gradients, make_batch, make_module, randomize

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


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj", "k_proj"]},
        {"layers": "last:1"},
        # below the adapter nothing takes a gradient: not each function has one to give for its input
        *({"target_modules": [name], "layers": "last:1"} for name in ("down_proj", "gate_proj", "up_proj", "o_proj")),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_plain_path(tiny_base, quantization, options):
    fast, plain = (make_module(tiny_base, fast=fast, quantization=quantization, **options) for fast in (True, False))
    assert_same_step(loss_and_gradients(fast), loss_and_gradients(plain))
    assert all(map(runs_fused, layers_of(fast)))
    assert FusedDecoderLayer not in set(map(type, layers_of(plain)))


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_with_and_without_a_compiler_it_errs_no_more_than_the_plain_path(
    tiny_base, monkeypatch, caplog, compute_dtype, compiler
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
        assert "the slower way, without the C++ loops: g++ is not installed" in caplog.text
    assert 0 < distance(fast[1], exact[1]) <= max(1e-5, 1.1 * distance(plain[1], exact[1]))
    assert fast[0] == pytest.approx(exact[0], rel=1e-5 if compute_dtype == "fp32" else 1e-3)


@pytest.mark.parametrize("half", [".lora_A.", ".lora_B."])
def test_an_adapter_half_of_which_is_frozen_has_the_gradients_of_the_plain_path(tiny_base, half):
    modules = [make_module(tiny_base, fast=fast) for fast in (True, False)]
    for module in modules:
        for name, tensor in module.named_parameters():
            tensor.requires_grad_(half in name)
    assert_same_step(*map(loss_and_gradients, modules))


@pytest.mark.parametrize("rank", [4, 3])
def test_biases_of_a_base_are_added(rank):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        attention_bias=True, mlp_bias=True, attn_implementation=register_flat_attention(),
    )  # fmt: skip
    found = []
    for fast in (True, False):
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
        for name, tensor in base.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(tensor)
        freeze(base)
        model = randomize(add_adapters(base, rank=rank)).train()
        if fast:
            fuse_layers(model)
        ids = torch.arange(2, 32)[None]
        states = base.model(ids, samples=whole_samples([30]), use_cache=False).last_hidden_state
        gradients = torch.autograd.grad(states.sin().sum(), list(trainable_tensors(model).values()))
        found.append((float(states.detach().sum()), torch.cat([each.flatten() for each in gradients])))
        assert runs_fused(base.model.layers[0]) == fast
    assert_same_step(*found)


def test_a_sample_in_a_batch_has_the_hidden_states_that_it_has_alone(tiny_base):
    module, whole = make_module(tiny_base, compute_dtype="bf16"), batch()
    choose_layers(module.model)

    def hidden(start, end, lengths):
        inputs = {name: whole[name][:, start:end] for name in ("input_ids", "position_ids")}
        return module.causal_lm.base_model(**inputs, samples=whole_samples(lengths), use_cache=False).last_hidden_state

    together = hidden(0, sum(LENGTHS), LENGTHS)
    for start, end in itertools.pairwise(whole["cu_seqlens"].tolist()):
        assert torch.equal(hidden(start, end, [end - start]), together[:, start:end])


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its own compiler does
def test_compiled_it_gives_the_same_gradients(tiny_base):
    module = make_module(tiny_base)
    expected = loss_and_gradients(module)
    module.causal_lm.base_model.compile(backend="eager")
    assert_same_step(loss_and_gradients(module), expected)
    torch._dynamo.reset()


# ---- what is kept, and computed again -------------------------------------------------------------------------------


@pytest.mark.parametrize(("checkpoints", "casts"), [(True, False), (False, True), (True, True)])
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


def test_below_the_lowest_adapter_nothing_is_kept_for_backward(tiny_base):
    module, kept = make_module(tiny_base, layers="last:1"), []
    layers_of(module)[0].register_forward_hook(lambda *_: kept.append("first ends"))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append("a tensor") or tensor, lambda each: each):
        module.compute_loss(batch())
    assert kept[0] == "first ends"
    assert len(kept) > 1


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


WATCHED = ("mlp", "mlp.up_proj", "self_attn.k_proj.lora_A.default", "mlp.gate_proj.base_layer")
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


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((kind, "forward") for kind in (llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm, SiLUActivation)),
        *((kind, "forward") for kind in (nn.Linear, bnb.nn.Linear4bit)),
        (llama, "apply_rotary_pos_emb"),
    ],
)
def test_what_is_replaced_for_all_models_is_called(tiny_base, monkeypatch, owner, name):
    module, called = make_module(tiny_base), []
    usual = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(
            owner, name, functools.wraps(usual)(lambda *args, **options: called.append(name) or usual(*args, **options))
        )
        assert count_fused(module) == 0
    assert called
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
@pytest.mark.parametrize("has_trainer", [False, True])
def test_adapters_that_are_switched_and_merged_count_at_once(tiny_base, change, has_trainer):
    found = []
    for fast in (True, False):
        module = make_module(tiny_base, fast=fast, quantization="none").eval()
        module.trainer = lightning.Trainer(accelerator="cpu", logger=False) if has_trainer else None
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


def test_fast_may_be_switched_off_and_on(tiny_base):
    module = make_module(tiny_base)
    for fast, count in ((False, 0), (True, 2)):
        module.fast = fast
        assert count_fused(module) == count
        assert module.causal_lm.config._attn_implementation == register_flat_attention(fast)
        linears = [each for each in module.modules() if isinstance(each, FusedLinear4bit)]
        assert sum(map(runs_fused, linears)) == 7 * count


# ---- in a fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Fit some steps with a validation behind each."""

    def run(callback=None, max_steps=2, profiler=None, **settings):
        lightning.seed_everything(0, verbose=False)
        settings = {"rank": 2, "compute_dtype": "fp32", "quantization": "none", "learning_rate": 1e-2, **settings}
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=max_steps, val_check_interval=1, limit_val_batches=1, logger=False,
            num_sanity_val_steps=0, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=callback, profiler=profiler,
        )  # fmt: skip
        rows = str(rows_file)
        data = InstructionDataModule(train=rows, val=rows, tokenizer=str(tiny_base), batch_size=2)
        trainer.fit(QLoRAModule(str(tiny_base), warmup_ratio=0.0, **settings), data)

    return run


class Changing(lightning.Callback):
    """Changes all layers at some hook, once, and notes the losses."""

    def __init__(self, at, change):
        self.losses, self.due = [], True
        setattr(self, at, lambda trainer, module, *_: self.change(module, change))

    def change(self, module, change):
        for layer in layers_of(module) if self.due else ():
            change(layer)
        self.due = False

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
        ({"precision": "bf16-mixed"}, "trainer.precision is bf16-mixed .32-true computes"),
    ],
)
def test_the_reason_is_named_by_its_setting(tiny_base, options, reason):
    precision = {"precision": options.pop("precision")} if "precision" in options else {}
    assert re.search(reason, explain(make_module(tiny_base, **options), **precision))


def test_the_base_and_hooks_are_named_too(tiny_base):
    module = make_module(tiny_base)
    layers_of(module)[1].mlp.register_forward_hook(lambda *_: None)
    assert explain(module).startswith("1 of 2 layers train")
    for layer in layers_of(module):
        layer.mlp.act_fn, layer.self_attn.attention_dropout = nn.GELU(), 0.25
    module.causal_lm.config.update({"hidden_act": "gelu", "attention_dropout": 0.25})
    assert re.search("attention_dropout is 0.25; the base's hidden_act is gelu, not silu", explain(module))
