"""Types of transformers, in flat batches or a row at a time, compute what plain transformers and PEFT compute."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.cli import main
from qlora_lightning.model.anatomy import FLAT_TYPES, decoder_layers, runs_flat
from qlora_lightning.model.layers.decoder_layer import FusedDecoderLayer
from qlora_lightning.model.layers.fuse import FUSED_TYPES
from qlora_lightning.model.load.build import meta_model
from qlora_lightning.model.memory.formula import build_step_memory
from qlora_lightning.support.errors import UserError
from tests import families
from tests.adapters import make_run
from tests.random_base import save_family
from tests.steps import distance, loss_and_gradients, make_batch, make_module

# Each has something of its own: windows, caps, scales, biases, Conv1D, learned positions, layers of another name …
FLAT = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "granite",
    "olmo",
    "smollm3",
)
FLAT += ("cohere2", "deepseek_v2", "gpt2", "gpt_neox", "hyperclovax", "nemotron", "opt", "starcoder2")
ROW_BY_ROW = ("qwen3_5_text", "gpt_oss", "bloom", "modernbert-decoder")


@pytest.mark.parametrize("model_type", FLAT)
def test_a_flat_batch_is_rows_alone_by_plain_transformers_and_peft(model_type):
    assert model_type in FLAT_TYPES
    found = families.study(model_type)
    assert not families.differs(found), found


@pytest.mark.parametrize("model_type", ROW_BY_ROW)
def test_another_type_runs_a_row_at_a_time_and_is_the_same(model_type):
    assert model_type not in FLAT_TYPES
    found = families.study(model_type)
    assert not families.differs(found), found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(FLAT_TYPES) - set(FLAT)))
def test_all_types_in_flat_batches_are_proven(model_type):
    found = families.study(model_type)
    assert not families.differs(found), found


@pytest.mark.parametrize("model_type", [*FLAT[:8], "gpt2", "opt", "qwen3_5_text"])
def test_parts_are_found_by_structure_and_memory_is_planned(model_type, tmp_path):
    config = AutoConfig.from_pretrained(families.save_random(tmp_path, model_type))
    model = meta_model(config, torch.bfloat16, "nf4", None, {"rank": 2})
    layers = decoder_layers(model.get_base_model())
    assert len(layers) == 4
    fused = [isinstance(layer, FusedDecoderLayer) and layer.plain_reason is None for layer in layers]
    assert set(fused) == {model_type in FUSED_TYPES}
    step = build_step_memory(model, torch.bfloat16)
    assert step.layers == 4
    assert 64 * 2 * 4 < step.saved < 64 * 2 * 200  # a few dozen numbers as wide as the hidden state


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("bert", {}, "sees what comes behind a token"),
        ("mixtral", {}, r"\d\d% of its layers' weights are fused experts.* Set model.quantization to none"),
        ("deepseek_v3", {"quantization": "none"}, "on which PEFT puts no adapter in a deepseek_v3: expected other mod"),
    ],
)
def test_what_cannot_be_trained_as_asked_is_rejected_by_name(model_type, options, words, tmp_path):
    families.save_random(tmp_path, model_type)
    with pytest.raises(UserError, match=words):
        QLoRAModule(str(tmp_path), **options).configure_model()


def test_layers_of_a_kind_that_flat_attention_does_not_compute_run_a_row_at_a_time():
    assert runs_flat(families.make_config("qwen2"))
    assert not runs_flat(SimpleNamespace(model_type="qwen2", layer_types=["full_attention", "chunked_attention"]))


def test_a_type_that_transformers_does_not_have_is_rejected(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "llama9"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="its model_type is 'llama9', which is no causal language model of this version"
    ):
        QLoRAModule(str(base)).configure_model()


def test_a_llama_ignores_a_window_that_its_config_switches_off(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"sliding_window": 4, "use_sliding_window": False}
    (base / "config.json").write_text(json.dumps(config))
    module = make_module(base, quantization="none")
    _, gradients = loss_and_gradients(module, make_batch(families.LENGTHS))
    module.fast = False
    assert distance(gradients, loss_and_gradients(module, make_batch(families.LENGTHS))[1]) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "qwen3", "qwen3_5_text"])
def test_a_whole_run_of_a_type_is_merged_and_checked(model_type, tmp_path, tiny_base, capsys):
    base = save_family(tmp_path / "base", model_type, tiny_base)
    make_run(tmp_path / "run", base, quantization="none")
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]
    assert main(merge) == 0
    assert "Checked on 8 validation rows" in capsys.readouterr().out
