"""A cache entry is whole or not there, whoever builds, kills, damages or clears it; ``cache`` lists and clears them."""

import errno
import os
import time

import pytest
from filelock import FileLock

from qlora_lightning.cli import main
from qlora_lightning.sources.cache import cached_folder, hash_key
from tests.commands.conftest import run_command
from tests.equality import read_adapter, same
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("cache")


def build(folder):
    (folder / "text").write_bytes(b"abc")


def flip(file, place):
    """Change a file that keeps its size; its time of change differs, as it does for any write but one at once."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, time.time_ns() + 1_000_000_000))


def test_an_entry_is_built_once_for_each_key_and_kind():
    def build_no_more(folder):
        pytest.fail("built again")

    first = cached_folder("unpacked", {"a": 1, "b": [2]}, build, "thing")
    assert cached_folder("unpacked", {"b": [2], "a": 1}, build_no_more, "thing") == first
    other_key = cached_folder("unpacked", {"a": 2}, build, "other")
    other_kind = cached_folder("quantized", {"a": 1, "b": [2]}, build, "other")
    assert len({first, other_key, other_kind}) == 3


@pytest.mark.parametrize("record", [None, "{", "[]", '{"crc32": [7]}', '{"crc32": {"/dev/zero": 7}}'])
def test_an_entry_whose_build_was_killed_or_whose_record_is_damaged_is_built_again(record, caplog):
    folder = cached_folder("unpacked", {}, build, "thing")
    (folder / "entry.json").unlink()
    if record is not None:
        (folder / "entry.json").write_text(record)
    assert cached_folder("unpacked", {}, build, "thing") == folder
    assert (folder / "text").read_bytes() == b"abc"
    assert caplog.text.count("thing is damaged or unfinished") == 1


@pytest.mark.parametrize(
    ("error", "expectation"),
    [
        (OSError(errno.ENOENT, "not ours", "source.gguf"), pytest.raises(FileNotFoundError, match="not ours")),
        (OSError(errno.ENOSPC, "No space left"), rejects("cache.full", "No space left", "QLORA_LIGHTNING_CACHE")),
    ],
)
def test_a_failed_build_leaves_nothing_and_a_full_disk_names_the_ways_out(cache, error, expectation):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error

    with expectation:
        cached_folder("unpacked", {}, fail, "thing")
    assert not any(path.is_dir() for path in (cache / "unpacked").iterdir())


def test_damaged_bases_and_samples_are_made_again_by_the_next_fit(tiny_base, rows_file, cache, tmp_path, caplog):
    def fit(name):
        options = [f"model.base={tiny_base}", f"data.train={rows_file}", f"trainer.default_root_dir={name}"]
        options += ["model.rank=2", "model.compute_dtype=fp32", "data.batch_size=8", "trainer.accelerator=cpu"]
        assert main(["fit", *(f"--{each}" for each in options)]) == 0
        return name

    sound = fit(tmp_path / "sound")
    (base,), (samples,) = cache.glob("quantized/*/*.safetensors"), cache.glob("samples/*/ids.npy")
    before = base.read_bytes(), samples.read_bytes()
    flip(base, -1000)
    flip(samples, -2)
    damaged = fit(tmp_path / "damaged")
    assert (base.read_bytes(), samples.read_bytes()) == before
    assert caplog.text.count("is damaged") == 2
    assert same(read_adapter(damaged), read_adapter(sound))


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    """Run the command; return the lines that it printed."""
    code, out, _ = run_command("cache", *arguments)
    assert code == 0
    return out.splitlines()


@pytest.fixture
def folders():
    """An unpacked base and a quantized one, of 2 kB each."""

    def build(folder):
        (folder / "weights").write_bytes(bytes(2000))

    return [cached_folder("unpacked", {}, build, "smol.gguf"), cached_folder("quantized", {}, build, "smol nf4")]


def test_list_names_every_entry_and_the_total(folders, cache):
    lines = run("list")
    expected = {("unpacked", "smol.gguf", "2", "kB"), ("quantized", "smol", "nf4", "2")}
    assert {tuple(line.split()[:4]) for line in lines[1:3]} == expected
    assert {line.split()[-1] for line in lines[1:3]} == {str(folder) for folder in folders}
    assert lines[3] == f"total 4 kB in {cache}"


def test_clear_says_what_it_freed_and_leaves_a_running_build_and_what_is_not_the_caches(folders, cache, tmp_path):
    """QLORA_LIGHTNING_CACHE may be set to a folder that holds other things, and links may lead out of it."""
    running = cache / "unpacked" / hash_key({"running": 1})
    others = [tmp_path / "outside" / "precious", cache / "thesis", cache / "unpacked" / "notes", running / "half"]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    lines = run("clear", "--kind", "quantized")
    assert [folder.exists() for folder in folders] == [True, False]
    assert str(folders[1]) in lines[1]
    assert lines[-1] == "Removed 1, freed 2 kB."
    (folders[0] / "link").symlink_to(tmp_path / "outside")
    with FileLock(f"{running}.lock"):
        lines = run("clear")
    assert "(unfinished)" in " ".join(lines)
    assert lines[-1].startswith("Removed 1, freed 2 kB")
    assert not folders[0].exists()
    assert all(file.exists() for file in others)
    run("clear")  # what a build that was killed has left
    assert not running.exists()
    assert "nothing to clear" in run("clear")[0]
