import json
import shutil

import lightning
import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qlora_lightning import InstructionDataModule, QLoRAModule


@pytest.fixture
def told(tiny_base, rows_file, tmp_path, capsys):
    """What fits of one batch say of layers that are not fused; the base may have another config."""

    def run(precision="32-true", fits=1, change=lambda module: None, config=None, **settings):
        base = tiny_base
        if config is not None:
            base = tmp_path / "base"
            shutil.copytree(tiny_base, base)
            usual = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps(usual | config))
        module = QLoRAModule(str(base), **{"rank": 2, "compute_dtype": "fp32", **settings})
        module.configure_model()
        change(module)
        for _ in range(fits):
            trainer = lightning.Trainer(
                **{"accelerator": "cpu", "devices": 1, "max_steps": 1, "enable_progress_bar": False, "logger": False},
                **{"enable_checkpointing": False, "enable_model_summary": False, "precision": precision},
                default_root_dir=tmp_path,
            )
            data = InstructionDataModule(train=str(rows_file), tokenizer=str(tiny_base), batch_size=2)
            trainer.fit(module, data)
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if "slower layers" in line]

    return run


@pytest.mark.parametrize(
    "settings", [{}, {"compute_dtype": "bf16"}, {"fast": False}, {"config": {"hidden_act": "swish"}}]
)
def test_nothing_is_said_where_all_layers_run_fused_or_none_shall(told, settings):
    assert told(**settings) == []


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dropout": 0.1}, "drop inputs with probability 0.1 (model.dropout: 0 would run fused)"),
        ({"lora_options": {"use_dora": True}}, "are DoRA (plain LoRA, without use_dora"),
        ({"quantization": "int8"}, "stored in int8 (model.quantization: nf4 would run fused)"),
        ({"config": {"attention_dropout": 0.25}}, "attention_dropout 0.25 (0 there would run fused)"),
        ({"config": {"hidden_act": "gelu"}}, "hidden_act is gelu (only silu is fused"),
    ],
)
def test_why_layers_are_plain_is_said_in_one_sentence_with_what_to_do(told, settings, reason, compute_dtype):
    (line,) = told(compute_dtype=compute_dtype, **settings)
    assert line.startswith("All 2 layers train by the slower layers of PEFT and transformers: ")
    assert reason in line
    assert line.count(";") == 0


def test_two_reasons_are_said_together_once_in_every_fit(told):
    lines = told(fits=2, dropout=0.1, config={"attention_dropout": 0.25})
    assert len(lines) == 2
    assert all("probability 0.1" in line and "; the base's config.json has attention_dropout" in line for line in lines)


def test_a_layer_that_is_adapted_otherwise_is_counted(told):
    def hook(module):
        module.causal_lm.base_model.layers[1].mlp.register_forward_hook(lambda *_: None)

    (line,) = told(change=hook)
    assert line.startswith("1 of 2 layers train by the slower layers of PEFT and transformers: their parts have hooks")


def test_tokens_that_train_beside_and_mixed_precision_are_named(told):
    (line,) = told(compute_dtype="bf16", lora_options={"trainable_token_indices": [5]})
    assert "1 tensors train beside the adapters, as model.embed_tokens.token_adapter" in line
    (line,) = told(precision="bf16-mixed")
    assert "trainer.precision is bf16-mixed (32-true computes" in line


def test_layers_that_a_build_model_put_together_are_named_as_such(told):
    def unfuse(module):
        for layer in module.causal_lm.base_model.layers:
            layer.__class__ = LlamaDecoderLayer

    (line,) = told(change=unfuse)
    assert "build_model put them together itself (those of QLoRAModule.build_model run fused)" in line
