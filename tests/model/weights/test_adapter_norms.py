import math

import pytest
import torch

from qlora_lightning.base import open_base
from qlora_lightning.model.weights.base import OriginalWeights
from qlora_lightning.model.weights.merging import MergedWeights, adapted_layers, measure_movement, plan_merge
from tests.adapters import make_adapter

NAME = "model.layers.0.self_attn.q_proj"


def layer_with(tiny_base, tmp_path, a=None, b=None, **options):
    make_adapter(tmp_path / "adapter", tiny_base, rank=2, alpha=4, **options)
    plan = plan_merge(tiny_base, tmp_path / "adapter")
    layer = adapted_layers(plan)[NAME]
    if a is not None:
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    return layer, OriginalWeights(open_base(str(tiny_base))), plan


def test_norms_and_effective_rank_are_those_computed_by_hand(tiny_base, tmp_path):
    a, b = torch.zeros(2, 64), torch.zeros(64, 2)
    a[0, 3] = a[1, 5] = 1.0
    b[7, 0], b[9, 1] = 3.0, 1.0  # with alpha / rank = 2: singular values 6 and 2
    layer, weights, _ = layer_with(tiny_base, tmp_path, a, b)
    found = measure_movement(layer, NAME, weights)
    assert (found.module, found.rank) == (NAME, 2)
    assert found.update_norm == pytest.approx(math.sqrt(36 + 4))
    assert found.base_norm == pytest.approx(float(weights(f"{NAME}.weight").norm()))
    assert found.effective_rank == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert found.ratio == pytest.approx(found.update_norm / found.base_norm)


def test_an_update_of_one_direction_has_effective_rank_1_and_none_has_0(tiny_base, tmp_path):
    a, b = torch.ones(2, 64), torch.ones(64, 2)
    layer, weights, _ = layer_with(tiny_base, tmp_path, a, b)
    assert measure_movement(layer, NAME, weights).effective_rank == pytest.approx(1.0)
    layer.lora_B["default"].weight.data = torch.zeros(64, 2)
    found = measure_movement(layer, NAME, weights)
    assert (found.update_norm, found.effective_rank, found.ratio) == (0.0, 0.0, 0.0)


def test_the_update_of_dora_is_the_difference_that_it_makes(tiny_base, tmp_path):
    layer, weights, plan = layer_with(tiny_base, tmp_path, lora_options={"use_dora": True})
    difference = MergedWeights(plan, weights)(f"{NAME}.weight") - weights(f"{NAME}.weight")
    assert measure_movement(layer, NAME, weights).update_norm == pytest.approx(float(difference.norm()))
