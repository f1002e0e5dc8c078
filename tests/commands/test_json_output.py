import json
import os

import pytest

from qlora_lightning.commands.json_output import check_distinct, check_output_file, check_output_folder, write_json
from qlora_lightning.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize("name", ["new.json", "there/new.json", "file", "link", "/dev/stdout", "/dev/null", "pipe"])
def test_what_can_be_written_passes_and_nothing_is_left_of_the_trial(name, folder):
    (folder / "link").symlink_to("there/behind.json")
    os.mkfifo(folder / "pipe")
    before = sorted(folder.rglob("*"))
    check_output_file("--json", name)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("there", "--json there: that is a folder; name a file."),
        ("none/new.json", "--json none/new.json: there is no folder none."),
        ("file/new.json", "--json file/new.json: there is no folder file."),
        ("link", "--json link: there is no folder .*none."),
        ("/proc/new.json", "--json /proc/new.json: no file can be written there"),
        ("x" * 300, "no file can be written there .File name too long"),
    ],
)
def test_what_cannot_is_refused_in_a_sentence(name, words, folder):
    (folder / "link").symlink_to("none/behind.json")
    with pytest.raises(UserError, match=words):
        check_output_file("--json", name)


@pytest.mark.parametrize("name", ["there", "there/new", "there/new/deeper"])
def test_a_folder_that_can_be_made_passes(name, folder):
    before = sorted(folder.rglob("*"))
    check_output_folder("--out", name)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [("file", "is a file"), ("file/new", "file is a file; name"), ("/proc/new", "nothing can")],
)
def test_a_folder_that_cannot_is_refused(name, words):
    with pytest.raises(UserError, match=f"--out {name}: .*{words}"):
        check_output_folder("--out", name)


def test_one_file_under_two_options_is_refused(folder):
    (folder / "link").symlink_to("a")
    check_distinct({"--out": folder / "a", "--json": folder / "b", "--plot": None})
    for other in ("a", "there/../a", "link"):
        with pytest.raises(UserError, match="--out and --json both name"):
            check_distinct({"--out": folder / "a", "--json": folder / other})


def test_a_file_name_that_is_no_utf_8_is_written_as_json(folder):
    write_json(folder / "new.json", {"file": "ü\udcff"})
    assert json.loads((folder / "new.json").read_text()) == {"file": "ü\udcff"}
