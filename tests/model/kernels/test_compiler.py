import logging
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

from qlora_lightning.base.cache import list_entries
from qlora_lightning.model.kernels import library, loops
from qlora_lightning.model.layers.elementwise import normalize, normalize_backward

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="takes g++")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache that holds nothing yet, and a process that has not looked for the loops."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


def test_the_loops_are_compiled_once_and_kept(monkeypatch):
    ran, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: ran.append(args) or run(*args, **options))
    assert library.load_library() is not None
    library.load_library.cache_clear()
    assert library.load_library() is not None
    assert len(ran) == len(library._SOURCES) + 1  # and the linker
    (entry,) = list_entries("kernels")
    assert entry.label == "C++ loops for this CPU"


def test_another_cpu_takes_loops_of_its_own(monkeypatch):
    library.load_library()
    library.load_library.cache_clear()
    monkeypatch.setattr(library, "_cpu", lambda: "another")
    library.load_library()
    assert len(list_entries("kernels")) == 2


def test_without_a_compiler_which_is_told_torch_computes_the_same(monkeypatch, caplog):
    x, weight = torch.randn(5, 8), torch.randn(8)
    normed, inverse = normalize(x, weight, 1e-5)
    compiled = normed, inverse, normalize_backward(x.clone(), x, weight, inverse)
    library.load_library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    normed, inverse = normalize(x, weight, 1e-5)
    for ours, theirs in zip(
        compiled, (normed, inverse, normalize_backward(x.clone(), x, weight, inverse)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [each.getMessage() for each in caplog.records] == [
        "g++ is not installed: a step on the CPU takes the slower way, without the C++ loops."
    ]


def test_a_compiler_that_fails_is_told_and_torch_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(library, "_OPTIONS", ("--no-such-option",))
    with caplog.at_level(logging.WARNING):
        x = torch.randn(2, 8)
        torch.testing.assert_close(normalize(x, torch.ones(8), 1e-5)[0], F.rms_norm(x, (8,), eps=1e-5))
        normalize(x, torch.ones(8), 1e-5)
    (record,) = caplog.records
    assert "takes the slower way, without the C++ loops" in record.getMessage()
    assert "--no-such-option" in record.getMessage()
    assert not list_entries("kernels")


def test_a_cache_that_cannot_be_written_is_told_and_torch_goes_on(monkeypatch, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert not loops.can_run(torch.randn(2, 8))
    (record,) = caplog.records
    assert "The cache cannot keep" in record.getMessage()


def test_where_torch_has_other_threads_nothing_is_compiled_and_it_is_told(monkeypatch, caplog):
    monkeypatch.setattr(library, "_has_gnu_threads", lambda: False)
    assert library.load_library() is None
    assert "This torch has no GNU threads" in caplog.text
    assert not list_entries("kernels")
