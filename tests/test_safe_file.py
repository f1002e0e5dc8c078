import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.support.files import find_storage_fault, flush, put_in_place, write_whole

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch):
    def fail(*_):
        raise FULL

    monkeypatch.setattr("os.fsync", fail)


def test_a_text_is_written_and_nothing_stays_beside(tmp_path):
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", "Grüße")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Grüße"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_is_written_through_and_the_mode_of_the_file_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o604)
    link.symlink_to("disk/real")
    write_whole(link, b"new")
    assert (link.is_symlink(), real.read_text(), oct(real.stat().st_mode & 0o777)) == (True, "new", "0o604")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["disk", "link", "real"]


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_whole(pipe, "new")
    assert reader.communicate()[0] == b"new"
    assert pipe.is_fifo()
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("piped", [True, False])
def test_standard_output_is_written_on_in_its_place(tmp_path, piped):
    program = "import pathlib, qlora_lightning.support.files as s\nprint('before')\n"
    program += "s.write_whole(pathlib.Path('/dev/stdout'), 'written\\n')\nprint('after')"
    file = tmp_path / "out.txt"
    if piped:
        found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    else:
        with file.open("w") as opened:
            subprocess.run([sys.executable, "-c", program], check=True, stdout=opened)
        found = file.read_text()
    assert found == "before\nwritten\nafter\n"


def test_a_write_that_fails_leaves_nothing_beside(tmp_path, full_disk):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "old"}


def test_the_old_file_stays_until_the_new_one_is_on_the_disk(tmp_path, full_disk):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("old")
    new.write_text("new")
    with pytest.raises(OSError, match="No space left"):
        put_in_place(new, old)
    assert (old.read_text(), new.read_text()) == ("old", "new")


def test_file_and_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    done = []
    replace = os.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr("os.replace", lambda one, other: (done.append("renamed"), replace(one, other)))
    (tmp_path / "new").write_text("new")
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert done == [str(tmp_path / "new"), "renamed", str(tmp_path)]


def test_a_disk_that_cannot_flush_folders_is_used_all_the_same(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.fsync", refuse)
    flush(tmp_path)


def test_what_the_disk_says_is_found_wherever_it_is_hidden(tmp_path):
    assert find_storage_fault(FULL) == "No space left on device"
    wrapped = RuntimeError("unexpected pos 3520 vs 3414")
    wrapped.__context__ = FULL
    assert find_storage_fault(wrapped) == "No space left on device"
    with pytest.raises(Exception, match="os error 2") as caught:
        save_file({"a": torch.zeros(1)}, tmp_path / "no" / "a.safetensors")
    assert find_storage_fault(caught.value) == "No such file or directory"
    assert find_storage_fault(ValueError("rank is 3")) is None
