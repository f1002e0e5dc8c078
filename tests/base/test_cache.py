"""A cache entry is whole or not there, whoever builds, kills, damages or clears it."""

import errno
import os
import time

import pytest
from filelock import FileLock

from qlora_lightning.base.cache import (
    cache_root,
    cached_folder,
    check_entry,
    clear_entries,
    find_entry,
    hash_key,
    list_entries,
)
from qlora_lightning.support.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")
FULL = "No space left on device"


def build(folder):
    (folder / "text").write_bytes(b"abc")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.safetensors").write_bytes(b"weight")


def build_no_more(folder):
    pytest.fail("built again")


def flip(file):
    """Change a file that keeps its size; its time of change differs, as it does for any write but one at once."""
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    os.utime(file, ns=(0, time.time_ns() + 1_000_000_000))


def test_an_entry_is_built_once_for_each_key_and_kind():
    first = cached_folder("unpacked", {"a": 1, "b": [2]}, build, "thing")
    assert cached_folder("unpacked", {"b": [2], "a": 1}, build_no_more, "thing") == first
    assert find_entry("unpacked", {"a": 1, "b": [2]}) == first
    assert (first / "text").read_bytes() == b"abc"
    assert find_entry("unpacked", {"a": 2}) is find_entry("quantized", {"a": 1, "b": [2]}) is None


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
def test_a_damaged_entry_is_built_again_with_a_notice(damage, caplog):
    folder = cached_folder("unpacked", {}, build, "thing")
    damage(folder)
    assert find_entry("unpacked", {}) is None
    assert cached_folder("unpacked", {}, build, "thing") == folder
    assert (folder / "text").read_bytes() == b"abc"
    assert caplog.text.count("thing is damaged or unfinished") == 1


def test_weights_that_were_left_unread_are_checked_before_they_are_used(tmp_path):
    folder = cached_folder("unpacked", {}, build, "thing")
    for sound in (folder, tmp_path):  # which is no entry
        check_entry(sound)
    flip(folder / "sub" / "x.safetensors")
    assert cached_folder("unpacked", {}, build_no_more, "thing", check_weights=False) == folder
    with pytest.raises(UserError, match=r"The cached thing is damaged: .*x\.safetensors does not match its checksum"):
        check_entry(folder)
    assert find_entry("unpacked", {}, check_weights=False) is None  # the next start makes it again


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


def test_what_a_killed_build_left_is_never_taken_for_complete_and_a_running_one_is_not_cleared(cache):
    half = cache / "unpacked" / hash_key({})
    half.mkdir(parents=True)
    (half / "text").write_bytes(b"ab")
    assert find_entry("unpacked", {}) is None
    assert [(entry.label, entry.size_bytes) for entry in list_entries()] == [("(unfinished)", 2)]
    with FileLock(f"{half}.lock"):  # which a build holds
        removed, busy = clear_entries()
    assert (removed, [entry.path for entry in busy]) == ([], [half])
    assert (cached_folder("unpacked", {}, build, "thing") / "sub").is_dir()


def test_clearing_leaves_nothing_of_the_cache_and_all_else(cache, tmp_path):
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
    left = [path for path in [*cache.rglob("*"), *outside.rglob("*")] if not path.is_dir() or path.is_symlink()]
    assert sorted(left) == sorted(others)
