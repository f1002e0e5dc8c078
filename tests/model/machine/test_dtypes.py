import re

import pytest
import torch

from qlora_lightning.model.device import choose_compute_dtype, explain_dtype
from qlora_lightning.support.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_name_means_its_dtype(name, dtype):
    assert choose_compute_dtype(name, CPU) == dtype


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": False}, torch.float32), ({}, torch.float32)],
)
def test_auto_on_a_cpu_asks_for_bfloat16_instructions(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_compute_dtype("auto", CPU) == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_on_cuda_asks_for_the_compute_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_compute_dtype("auto", CUDA) == dtype


def test_bfloat16_on_a_gpu_that_emulates_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="only emulates: set it to fp16, or to auto"):
        choose_compute_dtype("bf16", CUDA)
    assert choose_compute_dtype("fp16", CUDA) == torch.float16


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("auto", "This CPU has no instructions for bf16 .* computed in fp32"),
        (
            "bf16",
            r"no instructions for bf16: products take up to a hundred times as long as in fp32\. Set",
        ),
        ("fp16", "no instructions for fp16"),
    ],
)
def test_what_to_expect_of_a_cpu_without_bfloat16_is_said(monkeypatch, name, told):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert re.search(told, explain_dtype(name, CPU))


def test_what_to_expect_of_a_gpu_without_bfloat16_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "products are computed in fp16" in explain_dtype("auto", CUDA)


def test_nothing_is_said_where_all_is_well_or_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert explain_dtype("auto", CPU) is explain_dtype("bf16", CPU) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert explain_dtype("fp32", CPU) is explain_dtype("auto", torch.device("meta")) is None
