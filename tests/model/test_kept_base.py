import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.base_model import keeping_base
from qlora_lightning.model.guards.checks import checksum_frozen


def made(base, **options):
    module = QLoRAModule(base=str(base), compute_dtype="fp32", **options)
    module.configure_model()
    return module


def set_adapter(module):
    """B starts at zero: give it something to do."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for tensor in trainable_tensors(module).values():
            tensor.normal_(std=0.1)


@pytest.mark.parametrize(
    ("quantization", "first"),
    [
        ("nf4", {}),
        ("nf4", {"dropout": 0.1}),
        ("nf4", {"lora_options": {"use_dora": True}}),
        ("nf4", {"lora_options": {"trainable_token_indices": [5]}}),
        ("int8", {}),
        ("none", {}),
        ("none", {"lora_options": {"use_dora": True}}),
    ],
    ids=str,
)
def test_a_base_that_carried_another_adapter_computes_as_one_just_loaded(tiny_base, quantization, first):
    ids = {"input_ids": torch.arange(3, 11)[None]}
    alone = made(tiny_base, quantization=quantization, target_modules="attention", rank=3)
    set_adapter(alone)
    with keeping_base() as kept:
        before = made(tiny_base, quantization=quantization, **first)
        set_adapter(before)
        base, sums = before.causal_lm, checksum_frozen(alone.causal_lm)
        assert kept.take_back(before.model)
        after = made(tiny_base, quantization=quantization, target_modules="attention", rank=3)
    assert after.causal_lm is base
    set_adapter(after)
    assert list(after.model.peft_config) == ["default"]
    assert {n for n, _ in after.named_parameters()} == {n for n, _ in alone.named_parameters()}
    assert checksum_frozen(after.causal_lm) == sums
    with torch.no_grad():
        assert torch.equal(after.model(**ids).logits, alone.model(**ids).logits)


def test_another_base_is_loaded_for_other_settings_outside_and_while_the_first_is_lent(tiny_base):
    with keeping_base() as kept:
        first, second = made(tiny_base), made(tiny_base)
        assert not kept.take_back(first.model)  # another one was lent since
        third = made(tiny_base)
        assert kept.take_back(third.model)
        other = made(tiny_base, quantization="int8")
        assert not kept.take_back(other.causal_lm)  # no adapter of PEFT's: nobody knows what was changed
        last = made(tiny_base, quantization="int8")
    outside = made(tiny_base, quantization="int8")
    assert len({id(each.causal_lm) for each in (first, second, third, other, last, outside)}) == 6
