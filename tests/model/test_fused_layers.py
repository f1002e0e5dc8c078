"""Fused layers compute what those of PEFT and transformers do, and only where nobody would miss these."""

import shutil

import lightning
import peft
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from qlora_lightning import QLoRAModule
from qlora_lightning.model.cpu import library
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer, cast_adapters
from qlora_lightning.support.versions import enable_activation_checkpointing
from tests.random_base import save_random_llama
from tests.steps import assert_same_step, distance, fit, loss_and_gradients, make_batch, make_module


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


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory, tiny_base):
    """No width of this LLaMA is a multiple of a vector's."""
    folder = tmp_path_factory.mktemp("odd")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    save_random_llama(folder, torch.float32, hidden_size=40, intermediate_size=74)
    return folder


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("base", "compiler"), [("tiny_base", True), ("tiny_base", False), ("odd_base", True)])
def test_with_and_without_a_compiler_it_errs_no_more_than_the_plain_path(
    request, monkeypatch, compute_dtype, base, compiler
):
    base = request.getfixturevalue(base)
    exact, plain = (
        loss_and_gradients(make_module(base, fast=False, compute_dtype=dtype)) for dtype in ("fp32", compute_dtype)
    )
    if not compiler:
        library.load_library.cache_clear()
        monkeypatch.setattr(shutil, "which", lambda name: None)
    fast = loss_and_gradients(make_module(base, compute_dtype=compute_dtype))
    if not compiler:
        library.load_library.cache_clear()
    assert 0 < distance(fast[1], exact[1]) <= max(1e-5, 1.1 * distance(plain[1], exact[1]))
    assert fast[0] == pytest.approx(exact[0], rel=1e-5 if compute_dtype == "fp32" else 1e-3)


def test_checkpointed_layers_and_adapters_that_are_cast_at_once_give_the_same_numbers(tiny_base):
    module = make_module(tiny_base, compute_dtype="bf16")
    loss, gradients = loss_and_gradients(module)
    enable_activation_checkpointing(module.causal_lm)
    options = {"casts": cast_adapters(module.model)}  # as on a GPU, where each cast of its own would be a launch
    module.causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, usual: (args, usual | options), with_kwargs=True
    )
    second = loss_and_gradients(module)
    assert second[0] == loss
    assert torch.equal(second[1], gradients)


# ---- what was changed before a start --------------------------------------------------------------------------------


class Doubled(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):
        return 2 * self.part(*args)


def replace_norm(module):
    layer = layers_of(module)[0]
    layer.input_layernorm = Doubled(layer.input_layernorm)


def hook(part):
    return lambda module: layers_of(module)[0].get_submodule(part).register_forward_hook(lambda *each: 2 * each[-1])


def add_second(module):
    torch.manual_seed(0)
    module.model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    module.model.base_model.set_adapter(["default", "b"])


def merge(module):
    module.model.merge_adapter()


@pytest.mark.parametrize(
    "change", [replace_norm, hook("mlp"), hook("self_attn.k_proj.lora_A.default"), add_second, merge]
)
def test_what_is_replaced_watched_added_or_merged_counts_from_the_next_start_on(tiny_base, change):
    losses = []
    for fast in (True, False):
        module = make_module(tiny_base, quantization="none", fast=fast)
        before = module.compute_loss(make_batch()).nll_sum.item()
        change(module)
        module.choose_layers()
        losses.append(module.compute_loss(make_batch()).nll_sum.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (losses[0] == pytest.approx(before, rel=1e-5)) is (change is merge)


# ---- in a fit -------------------------------------------------------------------------------------------------------


class Hooks(lightning.Callback):
    calls = 0

    def on_train_start(self, trainer, module):
        layers_of(module)[1].mlp.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


def test_what_a_callback_hooks_at_the_start_is_called_in_training(tiny_base, rows_file, tmp_path):
    fit(QLoRAModule(str(tiny_base), rank=2), tmp_path, rows_file, max_steps=1, callbacks=[hooks := Hooks()])
    assert hooks.calls == 1


TRAINED_NORMS = {"compute_dtype": "bf16", "lora_options": {"modules_to_save": ["norm"]}}


@pytest.mark.parametrize(
    ("options", "precision", "reason"),
    [
        ({}, "32-true", None),
        ({"dropout": 0.1}, "32-true", "model.dropout is not 0"),
        ({"lora_options": {"use_dora": True}}, "32-true", "model.lora_options ask for more than plain LoRA"),
        (TRAINED_NORMS, "32-true", "their parts are hooked, replaced or trained"),
        ({}, "bf16-mixed", "trainer.precision is bf16-mixed"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_fit_reports_why_layers_are_plain_if_they_are(
    tiny_base, rows_file, tmp_path, capsys, options, precision, reason
):
    module = QLoRAModule(str(tiny_base), **{"rank": 2, "compute_dtype": "fp32", "quantization": "none"} | options)
    fit(module, tmp_path, rows_file, max_steps=1, precision=precision)
    sentence = "2 of 2 layers train by the slower layers of PEFT and transformers: "
    printed = " ".join(capsys.readouterr().out.split())
    assert (sentence in printed) == (reason is not None)
    assert reason is None or sentence + reason in printed
