"""Fused layers compute what those of PEFT and transformers do, and only where nobody would miss these."""

import logging

import lightning
import peft
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from qlora_lightning import QLoRAModule
from qlora_lightning.model.cpu import library
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer
from tests.random_base import save_random_llama
from tests.steps import assert_same_step, distance, fit, loss_and_gradients, make_batch, make_module


def layers_of(module):
    return list(module.causal_lm.base_model.layers)


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
    fused = [isinstance(layer, FusedDecoderLayer) and layer.fallback_reason is None for layer in layers_of(fast)]
    assert fused == [True, True]
    assert_same_step(loss_and_gradients(fast), loss_and_gradients(plain))


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory, tiny_base):
    """No width of this LLaMA is a multiple of a vector's."""
    folder = tmp_path_factory.mktemp("odd")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    save_random_llama(folder, torch.float32, hidden_size=40, intermediate_size=74)
    return folder


def assert_errs_no_more_than_the_plain_path(base, compute_dtype):
    exact, plain = (
        loss_and_gradients(make_module(base, fast=False, compute_dtype=dtype)) for dtype in ("fp32", compute_dtype)
    )
    fast = loss_and_gradients(make_module(base, compute_dtype=compute_dtype))
    assert 0 < distance(fast[1], exact[1]) <= max(1e-5, 1.1 * distance(plain[1], exact[1]))
    assert fast[0] == pytest.approx(exact[0], rel=1e-5 if compute_dtype == "fp32" else 1e-3)


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("base", "threads"), [("tiny_base", 1), ("odd_base", 3)])
def test_in_any_dtype_it_errs_no_more_than_the_plain_path(request, base, threads, compute_dtype):
    before, base = torch.get_num_threads(), request.getfixturevalue(base)
    torch.set_num_threads(threads)
    try:
        assert_errs_no_more_than_the_plain_path(base, compute_dtype)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache that holds nothing yet, and a process that has not looked for the C++ kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_failed_compilation_is_reported_and_torch_computes(tiny_base, monkeypatch, tmp_path, caplog, compute_dtype):
    (tmp_path / "g++").write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with caplog.at_level(logging.WARNING):
        assert_errs_no_more_than_the_plain_path(tiny_base, compute_dtype)
    (record,) = caplog.records
    assert "are slower without the C++ kernels: no such option" in record.getMessage()


# ---- what was changed before a start --------------------------------------------------------------------------------


def replace_norm(module):
    layers_of(module)[0].input_layernorm = nn.LayerNorm(64)


def hook(part):
    return lambda module: layers_of(module)[0].get_submodule(part).register_forward_hook(lambda *each: 2 * each[-1])


def add_second(module):
    torch.manual_seed(0)
    module.model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    module.model.base_model.set_adapter(["default", "b"])


def merge(module):
    module.model.merge_adapter()


@pytest.mark.parametrize("change", [replace_norm, hook("self_attn.k_proj.lora_A.default"), add_second, merge])
def test_what_is_replaced_watched_added_or_merged_counts_from_the_next_start_on(tiny_base, change):
    losses = []
    for fast in (True, False):
        module = make_module(tiny_base, quantization="none", fast=fast)
        before = module.compute_loss(make_batch()).loss_sum.item()
        change(module)
        module.choose_layers()
        losses.append(module.compute_loss(make_batch()).loss_sum.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (losses[0] == pytest.approx(before, rel=1e-5)) is (change is merge)


# ---- in a fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "reason"), [({}, None), ({"dropout": 0.1}, "model.dropout is not 0")])
def test_a_fit_reports_why_layers_are_plain_if_they_are(tiny_base, rows_file, tmp_path, capsys, options, reason):
    module = QLoRAModule(str(tiny_base), **{"rank": 2, "compute_dtype": "fp32", "quantization": "none"} | options)
    fit(module, tmp_path, rows_file, max_steps=1)
    sentence = "2 of 2 layers train with the slower layers of PEFT and transformers: "
    printed = " ".join(capsys.readouterr().out.split())
    assert (sentence in printed) == (reason is not None)
    assert reason is None or sentence + reason in printed


class Watches(lightning.Callback):
    """Hooks a part when training begins."""

    calls = 0

    def on_train_start(self, trainer, pl_module):
        layers_of(pl_module)[0].self_attn.q_proj.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


def test_a_hook_that_a_callback_adds_behind_the_start_of_a_fit_is_called(tiny_base, rows_file, tmp_path):
    watches = Watches()
    fit(QLoRAModule(str(tiny_base), rank=2), tmp_path, rows_file, max_steps=2, callbacks=[watches])
    assert watches.calls == 2
