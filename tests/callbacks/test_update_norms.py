"""How far an adapter moves each weight: the size of the update in the report, and the directions that it uses."""

import math

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer

from qlora_lightning.callbacks.update_norms import measure_updates
from qlora_lightning.model.adapters.targets import layer_of
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
