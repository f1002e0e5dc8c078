"""A file is whole or as it was, whatever the disk does; JSON that is cut off is rejected; lines are printed as are."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.support.console import brief, print_detail, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import find_storage_fault, read_json_object, write_whole

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_file_keeps_its_mode_and_a_link_is_replaced(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    write_whole(file, "one")
    file.chmod(0o604)
    write_whole(file, "two")
    assert oct(file.stat().st_mode & 0o777) == "0o604"
    link.symlink_to(file)
    write_whole(link, "Grüße \udcff")  # a file name may hold bytes that are no UTF-8
    assert (link.is_symlink(), link.read_text(encoding="utf-8"), file.read_text()) == (False, "Grüße \\udcff", "two")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(FULL))
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "old"}


@pytest.mark.parametrize("kind", ["named pipe", "file"])
def test_a_stream_is_written_on_in_its_place(tmp_path, kind):
    target = tmp_path / "target" if kind == "named pipe" else "/dev/stdout"
    program = "import pathlib, qlora_lightning.support.files as s\nprint('before')\n"
    program += f"s.write_whole(pathlib.Path({str(target)!r}), 'written\\n')\nprint('after')"
    if kind == "named pipe":
        os.mkfifo(target)
        reader = subprocess.Popen(["cat", target], stdout=subprocess.PIPE)
    with (tmp_path / "out.txt").open("w") as opened:
        subprocess.run([sys.executable, "-c", program], check=True, stdout=opened)
    if kind == "named pipe":
        assert reader.communicate()[0] == b"written\n"
        assert target.is_fifo()
    else:
        assert (tmp_path / "out.txt").read_text() == "before\nwritten\nafter\n"


def test_what_the_disk_says_is_found_wherever_it_is_hidden(tmp_path):
    wrapped = RuntimeError("unexpected pos 3520 vs 3414")
    wrapped.__context__ = FULL
    assert find_storage_fault(FULL) == find_storage_fault(wrapped) == "No space left on device"
    with pytest.raises(Exception, match="os error 2") as caught:
        save_file({"a": torch.zeros(1)}, tmp_path / "no" / "a.safetensors")
    assert find_storage_fault(caught.value) == "No such file or directory"
    assert find_storage_fault(ValueError("rank is 3")) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'\xef\xbb\xbf{"name": "x"}', None),  # a byte order mark
        (b'{"name": ', "a.json is not JSON, or it is cut off (Expecting value: line 1 column 10 (char 9))."),
        (100_000 * b"[", "a.json is not JSON, or it is cut off ("),
        (b"[]", "a.json: expected a JSON object, found list."),
    ],
)
def test_a_json_object_is_read_or_refused_with_what_to_do(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    if words is None:
        assert read_json_object(tmp_path / "a.json", "Make it again.") == {"name": "x"}
        return
    with pytest.raises(UserError) as caught:
        read_json_object(tmp_path / "a.json", "Make it again.")
    assert words in str(caught.value)
    assert str(caught.value).endswith(" Make it again.")


def test_a_line_is_printed_as_it_is(capsys):
    say("[bold]a/path[/bold] " + "x" * 200)
    assert capsys.readouterr().out == "[bold]a/path[/bold] " + "x" * 200 + "\n"


def test_what_a_run_says_of_itself_is_left_out_in_brief(capsys):
    print_detail("one")
    with brief():
        print_detail("two")
        say("three")
    print_detail("four")
    assert capsys.readouterr().out.splitlines() == ["one", "three", "four"]
