"""The dtype of the products is what the machine computes quickly, or it says so."""

import re

import pytest
import torch

from qlora_lightning.model.load.machine import choose_compute_dtype, explain_dtype
from qlora_lightning.support.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "hardware", "dtype", "told"),
    [
        ("auto", CPU, {}, torch.bfloat16, None),
        ("auto", CPU, {"capabilities": {"avx512_bf16": False}}, torch.float32, "no bf16 .* computed in fp32"),
        ("bf16", CPU, {"capabilities": {}}, torch.bfloat16, "no bf16: products take up to a hundred times as long"),
        ("auto", CUDA, {}, torch.bfloat16, None),
        ("auto", CUDA, {"capability": (7, 5)}, torch.float16, "products are computed in fp16"),
        ("bf16", CUDA, {"capability": (7, 5)}, UserError, "only emulates: set it to fp16, or to auto"),
    ],
)
def test_dtypes_are_chosen_by_the_hardware_and_slow_ones_announced(monkeypatch, name, device, hardware, dtype, told):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware.get("capabilities", {"avx512_bf16": True}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hardware.get("capability", (8, 0)))
    if dtype is UserError:
        with pytest.raises(UserError, match=told):
            choose_compute_dtype(name, device)
        return
    assert choose_compute_dtype(name, device) == dtype
    found = explain_dtype(name, device)
    assert found is None if told is None else re.search(told, found)
