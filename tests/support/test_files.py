"""A file is whole or as it was, whatever the disk does."""

import errno

import pytest

from qlora_lightning.support.files import write_whole

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
