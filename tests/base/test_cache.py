import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lightning.base.cache import cache_root, cached_folder, hash_key
from qlora_lightning.support.errors import UserError

REPOSITORY = Path(__file__).parents[2]


class Builder:
    """Writes one file of three bytes, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.builds = 0

    def __call__(self, folder: Path) -> None:
        self.builds += 1
        (folder / "weights").write_bytes(b"abc")


def test_an_entry_is_built_once_and_then_found() -> None:
    build = Builder()
    first = cached_folder("unpacked", {"a": 1, "b": [2]}, build, "thing")
    second = cached_folder("unpacked", {"b": [2], "a": 1}, build, "thing")
    assert first == second
    assert build.builds == 1
    assert (first / "weights").read_bytes() == b"abc"


def test_another_key_or_kind_is_another_entry() -> None:
    build = Builder()
    folders = {
        cached_folder("unpacked", {"a": 1}, build, "thing"),
        cached_folder("unpacked", {"a": 2}, build, "thing"),
        cached_folder("quantized", {"a": 1}, build, "thing"),
    }
    assert len(folders) == build.builds == 3


def test_the_entry_file_names_label_key_and_sizes() -> None:
    folder = cached_folder("unpacked", {"transformers": "5"}, Builder(), "thing")
    entry = json.loads((folder / "entry.json").read_text())
    assert entry["label"] == "thing"
    assert entry["key"] == {"transformers": "5"}
    assert entry["files"] == {"weights": 3}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").write_bytes(b"ab"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "entry.json").write_text("{"),
        lambda folder: (folder / "entry.json").unlink(),
    ],
)
def test_a_damaged_entry_is_built_anew_with_a_notice(
    damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    folder = cached_folder("unpacked", {}, build, "thing")
    damage(folder)
    assert cached_folder("unpacked", {}, build, "thing") == folder
    assert build.builds == 2
    assert (folder / "weights").read_bytes() == b"abc"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "thing is damaged" in caplog.text


def test_a_failed_build_leaves_nothing_and_its_error_passes(cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise FileNotFoundError(errno.ENOENT, "not ours", "source.gguf")

    with pytest.raises(FileNotFoundError, match=r"source\.gguf"):
        cached_folder("unpacked", {}, build, "thing")
    assert [path.suffix for path in (cache / "unpacked").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
def test_a_full_disk_names_the_ways_out(error: Exception, cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(UserError, match=r"the disk is full.*QLORA_LIGHTNING_CACHE.*model\.cache: false") as caught:
        cached_folder("quantized", {}, build, "thing")
    assert str(cache / "quantized") in str(caught.value)
    assert [path.suffix for path in (cache / "quantized").iterdir()] == [".lock"]
    with pytest.raises(UserError, match=r"the disk is full.*cache clear") as caught:
        cached_folder("unpacked", {}, build, "thing")
    assert "model.cache" not in str(caught.value)


def test_a_cache_that_cannot_be_written_names_path_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/unpacked/.*Not a directory.*QLORA_LIGHTNING_CACHE"):
        cached_folder("unpacked", {}, Builder(), "thing")


def test_the_root_is_chosen_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", "~/mine")
    assert cache_root() == Path("/home/me/mine")
    monkeypatch.delenv("QLORA_LIGHTNING_CACHE")
    assert cache_root() == Path("/xdg/qlora_lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/home/me/.cache/qlora_lightning")


def test_two_processes_build_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    script = """
import logging, sys, time
from pathlib import Path
from qlora_lightning.base.cache import cached_folder
logging.basicConfig(level="INFO")
def build(folder):
    Path(sys.argv[1], "builds").open("a").write("built ")
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.02)
    (folder / "weights").write_bytes(b"abc")
folder = cached_folder("unpacked", {}, build, "thing")
assert (folder / "weights").read_bytes() == b"abc"
"""
    first = _start(script, tmp_path)
    _wait_for(tmp_path / "builds")
    second = _start(script, tmp_path)
    assert second.stderr is not None
    message = second.stderr.readline()
    (tmp_path / "go").touch()
    rest = [process.communicate(timeout=30)[1] for process in (first, second)]
    assert "Another process is making thing in the cache; waiting for it" in message
    assert (first.returncode, second.returncode, rest) == (0, 0, ["", ""])
    assert (tmp_path / "builds").read_text() == "built "


def test_a_killed_build_is_never_taken_for_complete(tmp_path: Path, cache: Path) -> None:
    script = """
import sys, time
from qlora_lightning.base.cache import cached_folder
def build(folder):
    (folder / "weights").write_bytes(b"ab")
    open(sys.argv[1], "w").close()
    time.sleep(60)
cached_folder("unpacked", {}, build, "thing")
"""
    process = _start(script, tmp_path / "started")
    _wait_for(tmp_path / "started")
    process.send_signal(signal.SIGKILL)
    process.communicate()

    name = hash_key({})
    assert not (cache / "unpacked" / name).exists()
    assert len(list((cache / "unpacked").glob(f".{name}.*"))) == 1
    folder = cached_folder("unpacked", {}, Builder(), "thing")
    assert (folder / "weights").read_bytes() == b"abc"
    assert list((cache / "unpacked").glob(f".{name}.*")) == []


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, qlora_lightning.base; assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    process = _start(script, Path())
    messages = process.communicate(timeout=30)[1]
    assert process.returncode == 0, messages


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


def _start(script: str, argument: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, str(argument)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
