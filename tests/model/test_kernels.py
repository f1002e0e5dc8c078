"""The C++ for a CPU is compiled once and kept; without it torch computes the same."""

import logging
import subprocess

import pytest
import torch

from qlora_lightning.base.cache import list_entries
from qlora_lightning.model.cpu import library
from qlora_lightning.model.cpu.library import has_function, load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason="takes Linux and g++")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache that holds nothing yet, and a process that has not looked for the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


def test_it_is_compiled_once_for_a_cpu_and_kept(monkeypatch, tmp_path):
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')  # the whole of it takes some seconds
    monkeypatch.setattr(library, "_SOURCES", (tmp_path / "one.cpp",))
    assert load_library().one() == 1
    library.load_library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert load_library().one() == 1
    assert [entry.label for entry in list_entries("kernels")] == ["C++ attention for this CPU"]


def test_if_it_cannot_be_compiled_it_is_reported_once_and_torch_computes(monkeypatch, tmp_path, caplog):
    (tmp_path / "g++").write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with caplog.at_level(logging.WARNING):
        assert not any(has_function("attend", torch.float32) for _ in range(2))
    (record,) = caplog.records
    assert "takes the slower way, without the C++ attention: no such option" in record.getMessage()
