import json
import os
import subprocess
import sys

import pytest
import yaml

from qlora_lightning.commands.input_files import find_inputs
from qlora_lightning.commands.json_output import (
    check_distinct,
    check_output_file,
    check_output_folder,
    json_file,
    tables_beside,
    write_json,
)
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize("name", ["new.json", "there/new.json", "file", "link", "/dev/stdout", "-", "/dev/null"])
def test_what_can_be_written_passes_and_nothing_is_left_of_the_trial(name, folder):
    (folder / "link").symlink_to("there/behind.json")
    before = sorted(folder.rglob("*"))
    check_output_file("--json", name, lambda file: True)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("there", "--json there: that is a folder; name a file."),
        ("none/new.json", "--json none/new.json: there is no folder none."),
        ("file/new.json", "--json file/new.json: there is no folder file."),
        ("link", "--json link: there is no folder .*none."),
        ("/proc/new.json", "--json /proc/new.json: no file can be written there"),
        ("", "--json is empty: name a file."),
        ("x" * 300, "no file can be written there .File name too long"),
    ],
)
def test_what_cannot_is_refused_in_a_sentence(name, words, folder):
    (folder / "link").symlink_to("none/behind.json")
    with pytest.raises(UserError, match=words):
        check_output_file("--json", name, lambda file: True)


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


def test_a_date_as_yaml_reads_it_is_written_as_text(folder):
    write_json(folder / "new.json", yaml.safe_load("{config: {day: 2026-11-25}}"))
    assert json.loads((folder / "new.json").read_text()) == {"config": {"day": "2026-11-25"}}


FOREIGN = ["words", "[]", "[1, 2]", "{}", '{"rows": 1}', '{"rows": 1, "metrics"', '"rows metrics"']


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_that_the_command_did_not_write_is_kept(content, folder):
    (folder / "old.json").write_text(content)
    with pytest.raises(UserError, match=r"--json old.json: that file is there, .*this command\. Name another\.$"):
        json_file("old.json", ("rows", "metrics"))
    with pytest.raises(UserError, match=r"Name another, or add --force\.$"):
        json_file("old.json", ("rows", "metrics"), force=False)
    json_file("old.json", ("rows", "metrics"), force=True)
    assert (folder / "old.json").read_text() == content


@pytest.mark.parametrize("content", ["", '{"rows": 1, "metrics": {}, "more": 2}'])
def test_an_empty_file_and_an_earlier_one_of_the_command_may_be_replaced(content, folder):
    (folder / "old.json").write_text(content)
    assert json_file("old.json", ("rows", "metrics")) == folder.__class__("old.json")


def test_a_file_that_is_read_is_never_replaced_whatever_it_is_called(folder):
    (folder / "data.json").write_text('{"rows": 1, "metrics": {}}')
    os.link(folder / "data.json", folder / "other.json")
    for name in ("data.json", "there/../data.json", "other.json"):
        with pytest.raises(UserError, match=f"--json {name}: this command reads that file. Name another."):
            json_file(name, ("rows", "metrics"), find_inputs(["--data.val=data.json"]), force=True)


def test_tables_make_way_for_a_json_on_standard_output():
    code = (
        "from pathlib import Path; import rich; from qlora_lightning.commands.json_output import *\n"
        "file = Path('/dev/stdout')\n"
        "with tables_beside(file): rich.print('table')\n"
        "write_json(file, {'a': 1}); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ('{\n  "a": 1\n}\nend\n', "table\n")


def test_what_a_shell_opens_for_another_program_is_written_into_while_that_reads():
    reading, writing = os.pipe()
    file = check_output_file("--json", f"/dev/fd/{writing}", lambda file: True)
    write_json(file, {"a": 1})
    assert os.read(reading, 100) == b'{\n  "a": 1\n}\n'
    os.close(reading)
    with pytest.raises(UserError, match=r"/dev/fd/\d+ cannot be written: Broken pipe"):
        write_json(file, {"a": 1})
    os.close(writing)


def test_tables_stay_where_they_are_beside_a_json_in_a_file(folder, capsys):
    for file in (None, folder / "new.json"):
        with tables_beside(file):
            print("table")
    assert capsys.readouterr() == ("table\ntable\n", "")
