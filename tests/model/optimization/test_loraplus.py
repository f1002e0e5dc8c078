import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.optimizer import check_loraplus_ratio, group_parameters
from qlora_lightning.support.errors import UserError


@pytest.fixture
def make_module(tiny_base):
    return lambda **options: QLoRAModule(base=str(tiny_base), rank=2, **options)


def rates(groups):
    """Learning rate and weight decay of each tensor."""
    return {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("lora_options", [{}, {"use_dora": True}, {"trainable_token_indices": [3]}], ids=str)
def test_groups_are_those_of_peft(make_module, lora_options):
    module = make_module(loraplus_ratio=16.0, lora_options=lora_options, quantization="none")
    module.configure_model()
    theirs = create_loraplus_optimizer(
        module.model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    groups = group_parameters(trainable_tensors(module), 1e-4, 16.0)
    ours = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1)
    assert rates(ours.param_groups) == rates(theirs.param_groups)


def test_an_adapter_on_an_embedding_has_pefts_own_rate():
    made = {"x.lora_embedding_A.default": nn.Parameter(torch.ones(2, 2)), "x.lora_A.default.weight": torch.ones(2, 2)}
    assert [group["lr"] for group in group_parameters(made, 1e-4, 4.0)] == [1e-4, 1e-6]


def test_without_a_ratio_all_is_one_group():
    tensors = {"a": nn.Parameter(torch.ones(1)), "b": nn.Parameter(torch.ones(1))}
    assert group_parameters(tensors, 1e-4, None) == [{"params": list(tensors.values())}]


@pytest.mark.parametrize("ratio", [0, 0.5, float("inf"), float("nan")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(UserError, match="expected 1 or more, such as 16, or null"):
        check_loraplus_ratio(ratio)
