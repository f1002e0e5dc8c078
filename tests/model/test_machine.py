"""What the machine can do: dtypes, memory, and an allocator that keeps what a step needs again."""

import contextlib
import gc
import re
import subprocess
import sys
import time

import lightning
import pytest
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.device import PeakWatch, choose_compute_dtype, explain_dtype
from qlora_lightning.support.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SLOW_CPU, FAST_CPU = ({"avx512_bf16": fast} for fast in (False, True))


@pytest.fixture
def machine(monkeypatch):
    def be(capabilities=FAST_CPU, capability=(8, 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return be


@pytest.mark.parametrize(
    ("name", "device", "hardware", "dtype", "told"),
    [
        ("auto", CPU, {}, torch.bfloat16, None),
        ("auto", CPU, {"capabilities": SLOW_CPU}, torch.float32, "no bf16 .* computed in fp32"),
        ("bf16", CPU, {"capabilities": {}}, torch.bfloat16, "no bf16: products take up to a hundred times as long"),
        ("auto", CUDA, {}, torch.bfloat16, None),
        ("auto", CUDA, {"capability": (7, 5)}, torch.float16, "products are computed in fp16"),
        ("bf16", CUDA, {"capability": (7, 5)}, UserError, "only emulates: set it to fp16, or to auto"),
    ],
)
def test_dtypes_are_chosen_by_the_hardware_and_slow_ones_announced(machine, name, device, hardware, dtype, told):
    machine(**hardware)
    if dtype is UserError:
        with pytest.raises(UserError, match=told):
            choose_compute_dtype(name, device)
        return
    assert choose_compute_dtype(name, device) == dtype
    found = explain_dtype(name, device)
    assert found is None if told is None else re.search(told, found)


def test_memory_that_was_taken_and_given_back_is_seen():
    before = PeakWatch(CPU).stop()  # one that never began
    watch = PeakWatch(CPU)
    watch.start()
    taken = bytearray(b"1" * 200_000_000)
    time.sleep(0.1)  # several looks
    del taken
    assert watch.stop() > before + 150_000_000


class Look(lightning.Callback):
    def on_train_batch_end(self, *args):
        assert gc.get_freeze_count() > 100_000
        raise ZeroDivisionError


@pytest.mark.parametrize("callbacks", [[], [Look()]], ids=["whole", "failing"])
def test_objects_are_frozen_while_steps_are_taken_and_not_after(tiny_base, rows_file, callbacks, tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, callbacks=callbacks, default_root_dir=tmp_path, **quiet)
    data = InstructionDataModule(train=str(rows_file), tokenizer=str(tiny_base))
    with pytest.raises(ZeroDivisionError) if callbacks else contextlib.nullcontext():
        trainer.fit(QLoRAModule(str(tiny_base)), data)
    assert gc.get_freeze_count() == 0


MEASURE = """
import ctypes
import resource
import torch
from qlora_lightning.model.device import giving_memory_back, keep_freed_memory, read_memory

def private_mib():
    return read_memory(torch.device("cpu"))["private_memory_gib"] * 1024

def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 * 1024**2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(1024).sum()
"""
# Blocks of 8 MiB, each followed by one of 64 KiB that stays: in one heap every block would be held open.
GIVING_BACK = """
before, stay, blocks = private_mib(), [], []
with giving_memory_back():
    for _ in range(30):
        blocks.append(torch.ones(2 * 1024**2))
        stay.append(torch.ones(16 * 1024))
    assert private_mib() - before > 230
    blocks.clear()
    assert private_mib() - before < 20, private_mib() - before
"""
# Without it a tensor of 8 MiB gets fresh pages, 2,048 of 4 KiB, each time.
KEEPING = """
keep_freed_memory()
first, *others = [faults_of_a_tensor() for _ in range(5)]
assert first > 2, first
assert max(others) <= 2, others
"""
# Objects as small as the gaps beside a tensor, which stay: without a stock each tensor of 4 MB would need a new place.
STAYING = """
glibc = ctypes.CDLL(None)
keep_freed_memory()
before = private_mib()
for _ in range(40):
    tensors = torch.ones(1024**2), torch.ones(1024**2)
    for size in range(16, 128, 8):
        for _ in range(3):
            glibc.malloc(size)
    del tensors
assert private_mib() - before < 20, private_mib() - before
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("code", [GIVING_BACK, KEEPING, STAYING], ids=["giving_back", "keeping", "staying"])
def test_the_allocator_gives_back_what_is_not_needed_and_keeps_what_is(code):
    """In a process of its own: what one sets stays for good."""
    done = subprocess.run([sys.executable, "-c", MEASURE + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
