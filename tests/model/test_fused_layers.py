"""Fused layers compute what those of PEFT and transformers do, and only where nobody would miss these."""

import shutil

import lightning
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.cpu import library
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, cast_adapters
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests.random_base import save_random_llama
from tests.steps import assert_same_step, distance, loss_and_gradients, make_batch, make_module, make_trainer


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


# ---- what changes between two passes, or between two runs -----------------------------------------------------------


def add_second(model):
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])


SWITCHES = [
    add_second,
    lambda model: model.merge_adapter(),
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


class Doubled(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):
        return 2 * self.part(*args)


CHANGES = {
    "a norm": lambda layer: setattr(layer, "input_layernorm", Doubled(layer.input_layernorm)),
    **{
        f"a hook on {part}": lambda layer, part=part: layer.get_submodule(part).register_forward_hook(
            lambda *inputs: 2 * inputs[-1]
        )
        for part in ("mlp", "self_attn.k_proj.lora_A.default")
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


# ---- in a fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Fit two steps with a validation behind each."""

    def run(*callbacks, precision="32-true", **settings):
        lightning.seed_everything(0, verbose=False)
        settings = {"rank": 2, "compute_dtype": "fp32", "quantization": "none", "learning_rate": 1e-2, **settings}
        options = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1, "precision": precision}
        trainer = make_trainer(tmp_path, callbacks=list(callbacks), **options)
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"dropout": 0.1}, "model.dropout is not 0"),
        ({"lora_options": {"use_dora": True}}, "model.lora_options ask for more than plain LoRA"),
        (
            {"compute_dtype": "bf16", "lora_options": {"modules_to_save": ["norm"]}},
            "their parts are hooked, replaced or trained",
        ),
        ({"precision": "bf16-mixed"}, "trainer.precision is bf16-mixed"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_fit_reports_why_layers_are_plain_if_they_are(fit, capsys, options, reason):
    fit(**options)
    sentence = "2 of 2 layers train by the slower layers of PEFT and transformers: "
    printed = " ".join(capsys.readouterr().out.split())
    assert (sentence in printed) == (reason is not None)
    assert reason is None or sentence + reason in printed
