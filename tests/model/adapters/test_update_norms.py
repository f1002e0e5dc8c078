"""How far an adapter moves each weight: the size of the update in the report, and the directions that it uses."""

import math

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer

from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.adapters.update_norms import measure_updates
from tests.adapters import make_adapter

OPTIONS = {"use_rslora": True, "rank_pattern": {"q_proj": 2}}


def test_each_update_is_measured_beside_its_weight(tiny_base, tmp_path):
    model = make_adapter(tmp_path / "adapter", tiny_base, lora_options=OPTIONS, target_modules="attention")
    table = measure_updates(model)
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    assert sum(map(len, table.values())) == len(layers) == 8
    for name, layer in layers.items():
        norm, packed = table[name.rpartition(".")[2]][layer_of(name)], layer.base_layer.weight
        weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        update = layer.get_delta_weight("default").detach()
        assert norm.rank == (2 if "q_proj" in name else 4)
        assert norm.ratio == pytest.approx(float(update.norm() / weight.norm()), rel=1e-4)
        shares = torch.linalg.svdvals(update.double())[: norm.rank]
        shares /= shares.sum()
        assert norm.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)


def test_equal_directions_count_as_so_many_and_an_untrained_adapter_as_none(tiny_base, tmp_path):
    model = make_adapter(tmp_path / "adapter", tiny_base, target_modules=["q_proj"], layers=[1], std=0.0)
    norm = measure_updates(model)["q_proj"][1]
    assert (norm.ratio, norm.rank, norm.effective_rank) == (0.0, 4, 0.0)
    layer = next(each for each in model.modules() if isinstance(each, LoraLayer))
    a, b = layer.lora_A["default"].weight.data.zero_(), layer.lora_B["default"].weight.data
    a[0, 3] = a[1, 5] = b[7, 0] = b[9, 1] = 3.0
    assert measure_updates(model)["q_proj"][1].effective_rank == pytest.approx(2.0)
