"""Fused layers compute what those of PEFT and transformers do, and only where nobody would miss these."""

import copy
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
from transformers import AutoTokenizer

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.cpu import library
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, cast_adapters
from qlora_lightning.model.layers.fuse import fuse_layers
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests.random_base import save_random_llama
from tests.steps import assert_same_step, distance, loss_and_gradients, make_batch, make_module, make_trainer, randomize


def layers_of(module):
    return list(module.causal_lm.base_model.layers)


def count_fused(module):
    """Count the layers that run fused, chosen once more."""
    module.choose_layers()
    return sum(isinstance(each, FusedDecoderLayer) and each.plain_reason is None for each in layers_of(module))


# ---- fused = plain --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "none"},
        {"target_modules": ["down_proj", "k_proj"]},
        # below the adapter nothing takes a gradient: not each function has one to give for its input
        *({"target_modules": [name], "layers": "last:1"} for name in ("down_proj", "gate_proj", "o_proj")),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_plain_path(tiny_base, options):
    fast, plain = (make_module(tiny_base, fast=fast, **options) for fast in (True, False))
    assert (count_fused(fast), count_fused(plain)) == (2, 0)
    expected = loss_and_gradients(plain)
    assert_same_step(loss_and_gradients(fast), expected)
    fast.fast = False
    assert count_fused(fast) == 0
    assert_same_step(loss_and_gradients(fast), expected)


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


def test_biases_of_a_base_are_added_and_half_an_adapter_may_be_frozen(tmp_path, tiny_base):
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    save_random_llama(tmp_path, torch.float32, hidden_size=32, intermediate_size=64, attention_bias=True, mlp_bias=True)
    tensors = load_file(tmp_path / "model.safetensors")
    biases = {name: torch.randn_like(tensor) for name, tensor in tensors.items() if name.endswith("bias")}
    save_file({**tensors, **biases}, tmp_path / "model.safetensors", {"format": "pt"})
    modules = [make_module(tmp_path, fast=fast, quantization="none", rank=3) for fast in (True, False)]
    for trains in (".lora_", ".lora_A.", ".lora_B."):
        for module in modules:
            for name, tensor in module.named_parameters():
                tensor.requires_grad_(trains in name)
        assert_same_step(*map(loss_and_gradients, modules))
    assert count_fused(modules[0]) == 2


@pytest.mark.parametrize(("storage", "bias"), [("none", True), ("nf4", False), ("fp4", True)])
def test_a_linear_gives_the_outputs_and_gradients_of_pefts_own(storage, bias):
    base = nn.ModuleDict({"proj": nn.Linear(64, 48, bias=bias)})
    if storage != "none":
        quantized = bnb.nn.Linear4bit(64, 48, bias=bias, quant_type=storage, compute_dtype=torch.float32)
        quantized.load_state_dict(base["proj"].state_dict())
        base = nn.ModuleDict({"proj": quantized})
    base.requires_grad_(False).to("cpu")  # quantizes
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = storage != "none", False
    model = randomize(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["proj"])), std=0.3)
    x, results = torch.randn(2, 7, 64, requires_grad=True), []
    for fuses in (False, True):
        assert not fuses or fuse_layers(model).linears == {"base_model.model.proj": None}
        layer = model.base_model.model["proj"]
        output = layer(x)
        results.append([output, *torch.autograd.grad(output.sin().sum(), [x, *trainable_tensors(model).values()])])
    for one, other in zip(*results, strict=True):
        assert distance(one.detach(), other.detach()) <= 1e-5
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert layer(x[:, :0]).shape == (2, 0, 48)


# ---- what is kept, and computed again -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", [False, True])
def test_checkpointed_layers_and_adapters_that_are_cast_at_once_give_the_same_numbers(tiny_base, checkpoints):
    module = make_module(tiny_base, compute_dtype="bf16")
    loss, gradients = loss_and_gradients(module)
    if checkpoints:
        enable_activation_checkpointing(module.causal_lm)
    options = {"casts": cast_adapters(module.model)}  # as on a GPU, where each cast of its own would be a launch
    module.causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, usual: (args, usual | options), with_kwargs=True
    )
    second = loss_and_gradients(module)
    assert second[0] == loss
    assert torch.equal(second[1], gradients)


@pytest.mark.parametrize("name", ["down_proj.lora_A", "down_proj.lora_B", "gate_proj.lora_A"])
def test_an_adapter_that_is_changed_between_forward_and_backward_is_refused(tiny_base, name):
    module = make_module(tiny_base)
    sums = module.compute_loss(make_batch())
    with torch.no_grad():
        next(tensor for each, tensor in trainable_tensors(module).items() if name in each).add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        sums.nll_sum.backward()


# ---- what changes between two passes, or between two runs -----------------------------------------------------------


def add_dora(model):
    model.add_adapter("d", peft.LoraConfig(r=2, use_dora=True, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("d")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_magnitude_vector["d"].weight.data *= 1.5


def add_second(model):
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])


SWITCHES = [
    *(add_dora, add_second, lambda model: model.merge_adapter()),
    lambda model: model.base_model.disable_adapter_layers(),
]


@pytest.mark.parametrize("change", SWITCHES)
def test_adapters_that_are_switched_and_merged_count_at_once(tiny_base, change):
    ours, plain = [], []
    for fast, results in ((True, ours), (False, plain)):
        module = make_module(tiny_base, fast=fast, quantization="none", target_modules=["q_proj", "up_proj"])
        torch.manual_seed(0)
        change(module.model)
        results.append(module.compute_loss(make_batch()).nll_sum.detach())
        module.choose_layers()
        results.append(module.compute_loss(make_batch()).nll_sum.detach())
        results.append(module.answer([[5, 6, 7, 8], [9, 10]], [1], 8))
    torch.testing.assert_close(ours, plain)
    assert ours[0] != make_module(tiny_base, quantization="none").compute_loss(make_batch()).nll_sum


def test_a_model_under_autocast_or_of_another_dtype_computes_as_the_plain_path(tiny_base):
    module = make_module(tiny_base, quantization="none")
    exact = loss_and_gradients(module)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(module)
    assert loss == pytest.approx(exact[0], abs=0.05)
    assert 0 < distance(gradients, exact[1]) < 0.1
    module.model.get_base_model().bfloat16()
    with pytest.warns(UserWarning, match=r"Hidden states are torch.bfloat16 where a layer computes in torch.float32"):
        module.compute_loss(make_batch())
    module.choose_layers()  # no warning: all of it is in bfloat16 now
    assert module.compute_loss(make_batch()).nll_sum.isfinite()


class Doubled(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):
        return 2 * self.part(*args)


CHANGES = {
    "a norm": lambda layer: setattr(layer, "input_layernorm", Doubled(layer.input_layernorm)),
    "an activation": lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
    "an MLP": lambda layer: setattr(layer, "mlp", Doubled(layer.mlp)),
    **{
        f"a hook on {part}": lambda layer, part=part: layer.get_submodule(part).register_forward_hook(
            lambda *inputs: 2 * inputs[-1]
        )
        for part in ("mlp", "self_attn.k_proj.lora_A.default", "mlp.gate_proj.base_layer")
    },
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_part_that_is_replaced_or_watched_is_called_from_the_next_start_on(tiny_base, change):
    losses = []
    for fast in (True, False):
        module = make_module(tiny_base, quantization="none", fast=fast)
        before = loss_and_gradients(module)[0]
        change(layers_of(module)[0])
        assert count_fused(module) == fast
        losses.append(loss_and_gradients(module)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(before, rel=1e-5)


def test_a_fused_model_is_copied_lists_its_states_and_unloads_like_any_other(tiny_base):
    module = make_module(tiny_base, quantization="none")
    layers_of(module)[0].self_attn.q_proj.get_base_layer().weight.requires_grad_()
    assert count_fused(module) == 1
    model = copy.deepcopy(module.model)
    ids = make_batch()["input_ids"]
    outputs = model(input_ids=ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, outputs.logits)


# ---- in a fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Fit two steps with a validation behind each."""

    def run(*callbacks, profiler=None, precision="32-true", **settings):
        lightning.seed_everything(0, verbose=False)
        settings = {"rank": 2, "compute_dtype": "fp32", "quantization": "none", "learning_rate": 1e-2, **settings}
        options = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1, "precision": precision}
        trainer = make_trainer(tmp_path, callbacks=list(callbacks), profiler=profiler, **options)
        rows = str(rows_file)
        data = InstructionDataModule(train=rows, val=rows, tokenizer=str(tiny_base), batch_size=2)
        trainer.fit(QLoRAModule(str(tiny_base), warmup_ratio=0.0, **settings), data)
        return float(trainer.callback_metrics["train_loss"])

    return run


class Hooks(lightning.Callback):
    def on_train_start(self, trainer, module):
        layers_of(module)[1].mlp.register_forward_hook(lambda *inputs: 2 * inputs[-1])


def test_what_a_callback_hooks_at_the_start_holds_in_training(fit):
    assert fit(Hooks()) == pytest.approx(fit(Hooks(), fast=False), rel=1e-5)
    assert fit(Hooks()) != pytest.approx(fit(), rel=1e-5)


def test_a_profile_of_pytorch_names_the_parts_of_a_step(fit, tmp_path):
    always = {"schedule": lambda step: torch.profiler.ProfilerAction.RECORD}
    fit(profiler=PyTorchProfiler(tmp_path, "profile", row_limit=-1, export_to_chrome=False, **always))
    table = (tmp_path / "fit-profile.txt").read_text()
    for name in ("NormedQKV", "Rotary", "SampleAttention", "LoRALinearFunction", "NormedGateUp", "SwiGLUDown"):
        assert name in table
        assert f"{name}Backward" in table


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"fast": False}, None),
        ({"dropout": 0.1}, "model.dropout is not 0"),
        ({"lora_options": {"use_dora": True}}, "model.lora_options ask for PEFT's DoraLinearVariant"),
        ({"quantization": "int8"}, "model.quantization is int8"),
        ({"compute_dtype": "bf16", "lora_options": {"modules_to_save": ["norm"]}}, "model.lora_options train "),
        ({"precision": "bf16-mixed"}, "trainer.precision is bf16-mixed"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_fit_reports_why_layers_are_plain_if_they_are(fit, capsys, options, reason):
    fit(**options)
    sentence = "All 2 layers train by the slower layers of PEFT and transformers: "
    printed = " ".join(capsys.readouterr().out.split())
    assert (sentence in printed) == (reason is not None)
    assert reason is None or sentence + reason in printed
