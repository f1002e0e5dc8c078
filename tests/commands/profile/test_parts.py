import importlib
import pkgutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import qlora_lightning.model
from qlora_lightning.commands.profile.parts import (
    ACTIVATION,
    ADAPTERS,
    ATTENTION,
    BASE,
    DEQUANTIZATION,
    HEAD,
    NORMS,
    OPTIMIZER,
    REST,
    Widths,
    count_logit_rows,
    count_tokens,
    find_part,
    find_rule,
    is_scope,
    name_scope,
    read_widths,
)

WIDTHS = Widths(narrow=frozenset({8, 16, 24}), hidden=64, vocabulary=1000)


@pytest.mark.parametrize(
    ("name", "shapes", "around", "part"),
    [
        ("aten::mm", [[100, 64], [64, 128]], NORMS, BASE),
        ("aten::addmm_", [[100, 64], [100, 128], [128, 64], [], []], NORMS, BASE),
        ("aten::linear", [[1, 100, 64], [128, 64], []], REST, BASE),
        ("aten::mm", [[100, 64], [64, 24]], NORMS, ADAPTERS),  # x times the stacked A of queries, keys and values
        ("aten::addmm_", [[100, 128], [100, 8], [8, 128], [], []], ACTIVATION, ADAPTERS),
        ("aten::mm", [[8, 100], [100, 64]], REST, ADAPTERS),  # gradient of A
        ("aten::mm", [[100, 64], [64, 1000]], HEAD, HEAD),
        ("aten::mm", [[8, 64], [64, 8]], OPTIMIZER, None),
        ("aten::matmul", [[1, 4, 100, 16], [1, 4, 16, 100]], REST, ATTENTION),
        ("aten::bmm", [[4, 100, 16], [4, 16, 100]], REST, ATTENTION),
        ("aten::_to_copy", [[8, 64], [], []], NORMS, ADAPTERS),
        ("aten::mul_", [[8, 64], []], OPTIMIZER, None),
        ("aten::mul_", [[100, 64], [64]], NORMS, None),
        ("aten::scaled_dot_product_attention", [[1, 4, 100, 16]], REST, ATTENTION),
        ("ScaledDotProductFlashAttentionForCpu", [], REST, ATTENTION),
        ("torch_attn::_varlen_attn", [[100, 4, 16]], REST, ATTENTION),
        ("bitsandbytes::dequantize_4bit", [[4096, 1]], NORMS, DEQUANTIZATION),
        ("NormedLinears", [[1, 100, 64]], REST, NORMS),
        ("Optimizer.step#AdamW.step", [], REST, OPTIMIZER),
        ("aten::empty", [[]], ATTENTION, None),
    ],
)
def test_an_operator_has_a_part_by_name_and_shapes_or_none_of_its_own(name, shapes, around, part):
    found = find_part(name, shapes, around, WIDTHS)
    assert (None if found is None else found[0]) == part


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("aten::mm", [[24, 64], [64, 128]], BASE),
        ("aten::linear", [[1, 24, 64], [128, 64], []], BASE),
        ("aten::mm", [[24, 64], [64, 1000]], HEAD),
        ("aten::mm", [[24, 64], [64, 8]], ADAPTERS),
        ("aten::mm", [[24, 64], [64, 24]], ADAPTERS),  # x times the stacked A
        ("aten::mm", [[8, 24], [24, 64]], ADAPTERS),  # gradient of A
        ("aten::mul_", [[24, 64], [64]], None),
        ("aten::_to_copy", [[8, 64], [], []], ADAPTERS),
    ],
)
def test_as_many_tokens_as_a_rank_are_no_rank(name, shapes, part):
    found = find_part(name, shapes, REST, WIDTHS._replace(tokens=frozenset({24})))
    assert (None if found is None else found[0]) == part


def test_tokens_are_what_an_embedding_is_asked_for():
    assert count_tokens("aten::embedding", [[1000, 64], [1, 24], []]) == 24
    assert count_tokens("aten::mm", [[24, 64], [64, 8]]) is None


def test_a_range_says_its_part():
    assert find_part(name_scope(HEAD, whole=False), [], REST, WIDTHS) == (HEAD, False)
    assert find_part(name_scope(NORMS, whole=True), [], REST, WIDTHS) == (NORMS, True)
    assert is_scope(name_scope(HEAD, whole=True))
    assert not is_scope("aten::mm")


def test_logits_are_found_by_the_vocabulary():
    assert count_logit_rows([[30, 1000], [1000, 64]], WIDTHS) == 30
    assert count_logit_rows([[20, 1000], [], [30, 1000]], WIDTHS) == 30
    assert count_logit_rows([[30, 64], [64, 128]], WIDTHS) == 0
    assert count_logit_rows([[30, 64], [64, 1000]], WIDTHS) == 0  # the head's weight
    assert count_logit_rows([[30, 8], [8, 1000]], WIDTHS) == 0  # an adapter's
    assert count_logit_rows([[1000]], WIDTHS) == 0


def test_ranks_and_their_sums_are_read_from_the_model():
    layer = nn.ModuleDict({name: nn.Linear(6, 5) for name in ("q", "k", "v", "o")})
    config = LoraConfig(r=2, target_modules=["q", "k", "v", "o"])
    assert read_widths(get_peft_model(layer, config), hidden=6, vocabulary=9) == Widths(
        narrow=frozenset({2, 4}), hidden=6, vocabulary=9, clashing=frozenset({6})
    )


def test_every_autograd_function_of_the_model_has_a_rule():
    for module in pkgutil.walk_packages(qlora_lightning.model.__path__, "qlora_lightning.model."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                assert find_rule(value.__name__), f"commands/profile/parts.py has no rule for {value.__name__}"
