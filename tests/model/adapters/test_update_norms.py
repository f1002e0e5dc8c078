"""How far an adapter moves each weight: the size of the update in the report, and the directions that it uses."""

import math

import pytest
import torch
from peft.tuners.lora import LoraLayer

from qlora_lightning.base import open_base
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.adapters.update_norms import measure_updates
from qlora_lightning.model.merge import MergedWeights, TrainedWeights, plan_merge
from tests.adapters import make_adapter

OPTIONS = {"lora_options": {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "target_modules": "attention"}


@pytest.mark.parametrize(("quantization", "options"), [("nf4", {}), ("int8", {}), ("none", OPTIONS)], ids=str)
def test_each_update_is_measured_as_the_dense_difference_of_the_merged_weight(
    tiny_base, tmp_path, quantization, options
):
    model = make_adapter(tmp_path / "adapter", tiny_base, quantization, **options)
    table = measure_updates(model)
    before = TrainedWeights(open_base(str(tiny_base)), quantization, True, torch.float32)
    after = MergedWeights(plan_merge(tiny_base, tmp_path / "adapter"), before)
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    assert sum(map(len, table.values())) == len(layers)
    for name, layer in layers.items():
        norm, weight = table[name.rpartition(".")[2]][layer_of(name)], before(f"{name}.weight")
        ratio = (after(f"{name}.weight") - weight).norm() / weight.norm()
        shares = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())[: norm.rank]
        shares /= shares.sum()
        directions = math.exp(-(shares * shares.log()).sum())
        assert (norm.ratio, norm.effective_rank) == pytest.approx((float(ratio), directions), rel=1e-4)
        assert norm.rank == (2 if options and "q_proj" in name else 4)


def test_equal_directions_count_as_so_many_and_an_untrained_adapter_as_none(tiny_base, tmp_path):
    model = make_adapter(tmp_path / "adapter", tiny_base, target_modules=["q_proj"], layers=[1], std=0.0)
    norm = measure_updates(model)["q_proj"][1]
    assert (norm.ratio, norm.rank, norm.effective_rank) == (0.0, 4, 0.0)
    layer = next(each for each in model.modules() if isinstance(each, LoraLayer))
    a, b = layer.lora_A["default"].weight.data.zero_(), layer.lora_B["default"].weight.data
    a[0, 3] = a[1, 5] = b[7, 0] = b[9, 1] = 3.0
    assert measure_updates(model)["q_proj"][1].effective_rank == pytest.approx(2.0)
