import json
import os

import pytest

from qlora_lightning.commands.merge import staging
from qlora_lightning.commands.merge.staging import check_folder, staged_folder
from qlora_lightning.support.errors import UserError

_NOBODY = 2**22 + 1  # no process has so high a number


@pytest.fixture
def merged(tmp_path):
    """An earlier result."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "merge.json").write_text(json.dumps({"onto": "dequantized", "files": ["old.txt"]}))
    (folder / "old.txt").write_text("old")
    return folder


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_a_new_result_takes_the_place_of_the_old_one_and_nothing_else_is_left(merged, tmp_path):
    with staged_folder(merged, force=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(merged) == ["new.txt"]


def test_what_a_killed_merge_left_is_removed(merged, tmp_path):
    for remains in (f".out.{_NOBODY}.0123abcd", f".out.{_NOBODY}.0123abcd.old"):
        (tmp_path / remains).mkdir()
    (tmp_path / f".out.{os.getpid()}.0123abcd").mkdir()  # of one that runs
    with staged_folder(merged, force=True):
        pass
    assert names(tmp_path) == [f".out.{os.getpid()}.0123abcd", "out"]


def test_what_a_killed_merge_had_hidden_is_put_back(merged, tmp_path):
    merged.rename(tmp_path / f".out.{_NOBODY}.0123abcd.old")
    with pytest.raises(UserError, match="out exists: name another, or add --force"):
        check_folder(merged, force=False)
    assert (merged / "old.txt").read_text() == "old"


def test_an_interruption_between_hiding_the_old_and_naming_the_new_loses_nothing(merged, tmp_path, monkeypatch):
    replace, count = os.replace, []

    def interrupted(source, target):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(staging.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_folder(merged, force=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (merged / "old.txt").read_text() == "old"
