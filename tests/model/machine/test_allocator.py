import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def assert_runs(code):
    """In a process of its own: what one sets stays for good."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Blocks of 8 MiB, each followed by one of 64 KiB that stays: in one heap every block would be held open.
CODE = """
import torch
from qlora_lightning.model.device import read_memory
from qlora_lightning.model.device import giving_memory_back

def private_mib():
    return read_memory(torch.device("cpu"))["private_memory_gib"] * 1024

torch.ones(1024).sum()
before = private_mib()
stay = []
with giving_memory_back():
    blocks = []
    for _ in range(30):
        blocks.append(torch.ones(2 * 1024**2))
        stay.append(torch.ones(16 * 1024))
    assert private_mib() - before > 230
    blocks.clear()
    assert private_mib() - before < 20, private_mib() - before
assert len(stay) == 30
"""


def test_small_tensors_that_stay_do_not_hold_freed_ones():
    assert_runs(CODE)


# Without it a tensor of 8 MiB gets fresh pages, 2,048 of 4 KiB, each time.
KEEPING = """
import resource
import torch
from qlora_lightning.model.device import keep_freed_memory

def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 * 1024**2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
first, *others = [faults_of_a_tensor() for _ in range(5)]
assert first > 2, first
assert max(others) <= 2, others
"""


def test_kept_memory_is_taken_again_without_page_faults():
    assert_runs(KEEPING)


# Objects as small as the gaps beside a tensor, which stay: without a stock each tensor of 4 MB would need a new place.
STAYING = """
import ctypes
import torch
from qlora_lightning.model.device import keep_freed_memory
from qlora_lightning.model.device import read_memory

def private_mib():
    return read_memory(torch.device("cpu"))["private_memory_gib"] * 1024

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


def test_small_objects_that_stay_do_not_take_the_gaps_beside_tensors():
    assert_runs(STAYING)
