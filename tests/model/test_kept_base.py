from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.base_model import keeping_base, lend_base
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


def test_another_key_loads_another_base_and_nothing_is_kept_outside():
    loads = []

    def load():
        loads.append(SimpleNamespace(model=nn.Linear(1, 1)))
        return loads[-1]

    with keeping_base() as kept:
        assert lend_base("a", load) is loads[0]
        assert not kept.take_back(loads[0].model)  # no adapter of PEFT's: nobody knows what was changed
        assert lend_base("a", load) is loads[1]
    assert lend_base("a", load) is loads[2]


def test_a_base_that_was_not_given_back_is_not_lent_twice(tiny_base):
    with keeping_base() as kept:
        first = made(tiny_base)
        second = made(tiny_base)
        assert first.causal_lm is not second.causal_lm
        assert not kept.take_back(first.model)
        assert kept.take_back(second.model) is False or second.causal_lm is not first.causal_lm
        third = made(tiny_base, rank=2)
        assert third.causal_lm is not first.causal_lm
