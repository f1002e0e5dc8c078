"""What the machine can do: dtypes, and an allocator that keeps what a step frees."""

import re
import subprocess
import sys

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


# Without tune_malloc a tensor of 8 MiB gets fresh pages, 2,048 of 4 KiB, each time.
PROGRAM = """
import resource
import torch
from qlora_lightning.model.load.machine import tune_malloc

def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 * 1024**2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

tune_malloc()
first, *others = [faults_of_a_tensor() for _ in range(5)]
assert first > 2, first
assert max(others) <= 2, others
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_allocator_keeps_what_a_step_frees():
    """In a process of its own: what is set stays for good."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
