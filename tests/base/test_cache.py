"""A cache entry is whole or not there, whoever builds, kills, damages or clears it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_lightning.base.cache import cache_root, cached_folder, clear_entries, find_entry, hash_key, list_entries
from qlora_lightning.support.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def build():
    """Writes one file of three bytes and weights of six, and counts how often it was asked to."""

    def write(folder):
        write.builds += 1
        (folder / "text").write_bytes(b"abc")
        (folder / "sub").mkdir()
        (folder / "sub" / "x.safetensors").write_bytes(b"weight")

    write.builds = 0
    return write


def flip(file):
    """Change a file that keeps its size; its time of change differs, as it does for any write but one at once."""
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    os.utime(file, ns=(0, time.time_ns() + 1_000_000_000))


def test_an_entry_is_built_once_for_each_key_and_kind(build):
    first = cached_folder("unpacked", {"a": 1, "b": [2]}, build, "thing")
    assert cached_folder("unpacked", {"b": [2], "a": 1}, build, "thing") == first
    assert find_entry("unpacked", {"a": 1, "b": [2]}) == first
    assert (build.builds, (first / "text").read_bytes()) == (1, b"abc")
    assert find_entry("unpacked", {"a": 2}) is find_entry("quantized", {"a": 1, "b": [2]}) is None
    entry = json.loads((first / "entry.json").read_text())
    assert (entry["label"], entry["key"]) == ("thing", {"a": 1, "b": [2]})
    assert entry["files"] == {"text": 3, "sub/x.safetensors": 6}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "text").write_bytes(b"ab"),
        lambda folder: (folder / "text").unlink(),
        lambda folder: flip(folder / "text"),
        lambda folder: flip(folder / "sub" / "x.safetensors"),
        lambda folder: (folder / "entry.json").write_text("{"),
        lambda folder: (folder / "entry.json").unlink(),
    ],
)
def test_a_damaged_entry_is_built_again_with_a_notice(damage, build, caplog):
    folder = cached_folder("unpacked", {}, build, "thing")
    damage(folder)
    assert find_entry("unpacked", {}) is None
    assert cached_folder("unpacked", {}, build, "thing") == folder
    assert build.builds == 2
    assert (folder / "text").read_bytes() == b"abc"
    assert caplog.text.count("thing is damaged or unfinished") == 1


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("kind", "error", "expected", "words"),
    [
        ("unpacked", OSError(errno.ENOENT, "not ours", "source.gguf"), FileNotFoundError, r"source\.gguf"),
        ("unpacked", OSError(errno.ENOSPC, FULL), UserError, rf"{FULL}.*QLORA_LIGHTNING_CACHE.*make room.*cache clear"),
        ("quantized", RuntimeError(f"I/O: {FULL} (os error 28)"), UserError, FULL),  # what is written in Rust
    ],
)
def test_a_failed_build_leaves_nothing_and_a_full_disk_names_the_ways_out(cache, kind, error, expected, words):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(expected, match=words):
        cached_folder(kind, {}, fail, "thing")
    assert not any(path.is_dir() for path in (cache / kind).iterdir())


def test_the_root_is_chosen_by_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value, root in (
        ("QLORA_LIGHTNING_CACHE", "~/mine", "/home/me/mine"),
        ("QLORA_LIGHTNING_CACHE", "", "/home/me/.cache/qlora_lightning"),
        ("XDG_CACHE_HOME", "/xdg", "/xdg/qlora_lightning"),
    ):
        monkeypatch.setenv(name, value)
        assert str(cache_root()) == root


_BUILDER = """
import logging, sys, time
from pathlib import Path
from qlora_lightning.base.cache import cached_folder
import qlora_lightning.base, qlora_lightning.base.adapter_folder
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
logging.basicConfig(level="INFO")
here = Path(sys.argv[1])
def build(folder):
    (folder / "text").write_bytes(b"abc")
    (here / "builds").open("a").write("built ")
    while not (here / "go").exists():
        time.sleep(0.02)
assert (cached_folder("unpacked", {}, build, "thing") / "text").read_bytes() == b"abc"
"""


def start_building(folder):
    command = [sys.executable, "-c", _BUILDER, str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(file):
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


def test_two_processes_build_once_and_what_is_being_built_is_not_cleared(tmp_path):
    first = start_building(tmp_path)
    wait_for(tmp_path / "builds")
    second = start_building(tmp_path)
    message = second.stderr.readline()
    removed, busy = clear_entries()
    (tmp_path / "go").touch()
    rest = [process.communicate(timeout=30)[1] for process in (first, second)]
    assert "Another process is making thing in the cache; waiting for it" in message
    assert (first.returncode, second.returncode, rest) == (0, 0, ["", ""])
    assert (tmp_path / "builds").read_text() == "built "
    assert (removed, [entry.label for entry in busy]) == ([], ["(unfinished)"])
    assert [entry.label for entry in list_entries()] == ["thing"]


def test_a_killed_build_is_never_taken_for_complete(tmp_path, build):
    process = start_building(tmp_path)
    wait_for(tmp_path / "builds")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert find_entry("unpacked", {}) is None
    assert [(entry.label, entry.size_bytes) for entry in list_entries()] == [("(unfinished)", 3)]
    folder = cached_folder("unpacked", {}, build, "thing")  # nobody holds the lock
    assert (folder / "sub").is_dir()
    assert [entry.label for entry in list_entries()] == ["thing"]


def test_entries_are_listed_by_use(build):
    one, two = (cached_folder(kind, {}, build, kind) for kind in ("unpacked", "quantized"))
    os.utime(one / "entry.json", (1_000_000, 1_000_000))
    first, second = list_entries()
    assert (first.kind, first.label, first.size_bytes, first.path) == ("quantized", "quantized", 9, two)
    assert (second.path, second.last_used.timestamp()) == (one, 1_000_000)
    cached_folder("unpacked", {}, build, "unpacked")
    assert [entry.label for entry in list_entries()] == ["unpacked", "quantized"]


def test_clearing_leaves_nothing_of_the_cache_and_all_else(cache, build, tmp_path):
    """QLORA_LIGHTNING_CACHE may be set to a folder that holds other things, and links may lead out of it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = cached_folder("unpacked", {}, build, "one")
    (folder / "link").symlink_to(outside)
    (cache / "fingerprints").mkdir()
    others = [outside / "precious", cache / "thesis", cache / "unpacked" / "notes", cache / "unpacked" / "my.lock"]
    for file in [*others, cache / "fingerprints" / "x.json"]:
        file.write_text("x")
    others.append(folder.with_name(hash_key({"linked": 1})))
    others[-1].symlink_to(outside)
    clear_entries()
    assert sorted(
        path for path in [*cache.rglob("*"), *outside.rglob("*")] if not path.is_dir() or path.is_symlink()
    ) == sorted(others)
    assert all(path.exists() for path in others)
