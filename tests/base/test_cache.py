"""A cache entry is whole or not there, whoever builds, kills, damages or clears it."""

import errno
import os
import time

import pytest
from filelock import FileLock

from qlora_lightning import UserError
from qlora_lightning.base.cache import cached_folder, clear_entries, hash_key, list_entries

pytestmark = pytest.mark.usefixtures("cache")


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
    other_key = cached_folder("unpacked", {"a": 2}, build, "other")
    other_kind = cached_folder("quantized", {"a": 1, "b": [2]}, build, "other")
    assert len({first, other_key, other_kind}) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "text").unlink(),
        lambda folder: flip(folder / "text"),
        lambda folder: flip(folder / "sub" / "x.safetensors"),
        lambda folder: (folder / "entry.json").write_text("{"),
        lambda folder: (folder / "entry.json").unlink(),  # as a killed build leaves it
    ],
)
def test_a_damaged_entry_is_built_again_with_a_notice(damage, caplog):
    folder = cached_folder("unpacked", {}, build, "thing")
    damage(folder)
    assert cached_folder("unpacked", {}, build, "thing") == folder
    assert (folder / "text").read_bytes() == b"abc"
    assert caplog.text.count("thing is damaged or unfinished") == 1


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (OSError(errno.ENOENT, "not ours", "source.gguf"), FileNotFoundError, "source.gguf"),
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "QLORA_LIGHTNING_CACHE.*make room.*cache clear"),
    ],
)
def test_a_failed_build_leaves_nothing_and_a_full_disk_names_the_ways_out(cache, error, expected, words):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(expected, match=words):
        cached_folder("unpacked", {}, fail, "thing")
    assert not any(path.is_dir() for path in (cache / "unpacked").iterdir())


def test_clearing_leaves_a_running_build_and_what_is_not_the_caches(cache, tmp_path):
    """QLORA_LIGHTNING_CACHE may be set to a folder that holds other things, and links may lead out of it."""
    folder = cached_folder("unpacked", {}, build, "one")
    running = cache / "unpacked" / hash_key({"running": 1})
    others = [tmp_path / "outside" / "precious", cache / "thesis", cache / "unpacked" / "notes", running / "half"]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    assert {entry.label for entry in list_entries()} == {"one", "(unfinished)"}
    with FileLock(f"{running}.lock"):
        assert [entry.path for entry in clear_entries()] == [folder]
    assert not folder.exists()
    assert all(file.exists() for file in others)
