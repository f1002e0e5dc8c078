"""A base whose adapter is taken off, as between the trials of a sweep, is as one just loaded."""

import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.guards.checks import checksum_frozen


def made(base, spare=None, **options):
    """Make a module whose B is not zero."""
    module = QLoRAModule(base=str(base), compute_dtype="fp32", **options)
    module.spare = spare
    module.configure_model()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for tensor in trainable_tensors(module).values():
            tensor.normal_(std=0.1)
    return module


@pytest.mark.parametrize(
    ("quantization", "first"),
    [
        ("nf4", {"dropout": 0.1}),
        ("nf4", {"lora_options": {"use_dora": True}}),
        ("nf4", {"lora_options": {"trainable_token_indices": [5]}}),
        ("int8", {}),
        ("none", {"lora_options": {"use_dora": True}}),
    ],
    ids=str,
)
def test_a_base_that_carried_another_adapter_computes_as_one_just_loaded(tiny_base, quantization, first):
    second = {"quantization": quantization, "target_modules": "attention", "rank": 3}
    alone, before = made(tiny_base, **second), made(tiny_base, quantization=quantization, **first)
    base = before.causal_lm
    after = made(tiny_base, before.made, **second)
    assert after.causal_lm is base
    assert list(after.model.peft_config) == ["default"]
    assert {n for n, _ in after.named_parameters()} == {n for n, _ in alone.named_parameters()}
    assert checksum_frozen(after.causal_lm) == checksum_frozen(alone.causal_lm)
    ids = {"input_ids": torch.arange(3, 11)[None]}
    with torch.no_grad():
        assert torch.equal(after.model(**ids).logits, alone.model(**ids).logits)


def test_a_base_of_other_settings_or_that_trained_itself_is_not_taken_over(tiny_base):
    first = made(tiny_base)
    other = made(tiny_base, first.made, double_quant=False)
    assert other.causal_lm is not first.causal_lm
    first.causal_lm.model.norm.weight.requires_grad_()
    assert made(tiny_base, first.made).causal_lm is not first.causal_lm
