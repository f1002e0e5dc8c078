"""The C++ for a CPU: compiled once, or torch in its place; the same bits on any number of threads.

That it computes what torch does: ``test_fused_layers.py``, ``test_attention.py`` and ``test_loss.py``.
"""

import logging
import subprocess

import pytest
import torch
import torch.nn.functional as F

from qlora_lightning.base.cache import list_entries
from qlora_lightning.model.cpu import library, loops
from qlora_lightning.model.cpu.library import load_library
from qlora_lightning.model.layers.elementwise import rms_norm, rms_norm_backward, swiglu

pytestmark = pytest.mark.skipif(load_library() is None, reason="takes Linux and g++")

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loops_are_the_same_on_any_threads(dtype):
    x, weight = torch.randn(50, 576).to(dtype), torch.randn(576).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            normed, inverse = rms_norm(x, weight, EPS)
            grad_x = rms_norm_backward(x.clone(), x, weight, inverse)
            losses = loops.cross_entropy(x.clone(), torch.arange(50), True)
            results.append([normed, inverse, grad_x, swiglu(x, normed), *losses])
    finally:
        torch.set_num_threads(before)
    for found in zip(*results, strict=True):
        assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache that holds nothing yet, and a process that has not looked for the loops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_the_loops_are_compiled_once_for_a_cpu_and_kept(monkeypatch, tmp_path):
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')  # the whole of them takes some seconds
    monkeypatch.setattr(library, "_SOURCES", (tmp_path / "one.cpp",))
    assert load_library().one() == 1
    library.load_library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert load_library().one() == 1
    assert [entry.label for entry in list_entries("kernels")] == ["C++ loops for this CPU"]


@pytest.mark.usefixtures("fresh")
def test_if_they_cannot_be_compiled_it_is_reported_once_and_torch_computes(monkeypatch, tmp_path, caplog):
    (tmp_path / "g++").write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    x = torch.randn(2, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(rms_norm(x, torch.ones(8), EPS)[0], F.rms_norm(x, (8,), eps=EPS))
    (record,) = caplog.records
    assert "takes the slower way, without the C++ loops: no such option" in record.getMessage()
