import re
import sys
from pathlib import Path

import pytest

from qlora_lightning.base.cache import cached_folder
from qlora_lightning.commands.cache import main
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folders(cache: Path) -> list[Path]:
    def build(folder: Path) -> None:
        (folder / "weights").write_bytes(bytes(2000))

    return [
        cached_folder("unpacked", {}, build, "smol.gguf"),
        cached_folder("quantized", {}, build, "package:smol nf4"),
    ]


def test_list_names_every_entry_and_the_total(folders: list[Path], cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "what", "size", "made", "last", "used", "path"]
    assert {tuple(line.split()[:4]) for line in lines[1:3]} == {
        ("unpacked", "smol.gguf", "2", "kB"),
        ("quantized", "package:smol", "nf4", "2"),
    }
    assert {line.split()[-1] for line in lines[1:3]} == {str(folder) for folder in folders}
    assert lines[3] == f"total 4 kB in {cache}"


def test_list_of_nothing_is_a_sentence(cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out.startswith(f"The cache is empty ({cache})")


def test_clear_with_yes_says_what_it_freed(folders: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["clear", "--yes"]) == 0
    out = capsys.readouterr().out
    assert all(str(folder) in out for folder in folders)
    assert out.endswith("Removed 2, freed 4 kB.\n")
    assert not any(folder.exists() for folder in folders)
    assert main(["clear", "--yes"]) == 0
    assert capsys.readouterr().out.startswith("Nothing to remove in ")


def test_clear_of_a_kind_leaves_the_others(folders: list[Path]) -> None:
    assert main(["clear", "--kind", "quantized", "--yes"]) == 0
    assert [folder.exists() for folder in folders] == [True, False]


@pytest.mark.parametrize(("answer", "code"), [("Y", 0), (" yes ", 0), ("", 1), ("n", 1), ("yep", 1), (None, 1)])
def test_clear_asks_on_a_terminal_and_only_a_yes_is_one(folders, monkeypatch, capsys, answer, code):
    def respond(question):
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", respond)
    assert main(["clear"]) == code
    assert capsys.readouterr().out.endswith("Nothing removed.\n") == bool(code)
    assert all(folder.exists() for folder in folders) == bool(code)


def test_clear_without_a_terminal_needs_yes(folders, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(UserError, match=r"asks for a yes, and there is no terminal to ask on\. Add --yes"):
        main(["clear"])
    assert all(folder.exists() for folder in folders)


def test_mistakes_are_told_in_a_sentence(cache: Path) -> None:
    for arguments, words in (
        ([], "the following arguments are required: list | clear. See `qlora-lightning cache --help`."),
        (["lst"], "argument list | clear: invalid choice: 'lst'"),
        (["clear", "--kind", "x"], "argument --kind: invalid choice: 'x'"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            main(arguments)
    cache.write_text("x")
    for action in ("list", "clear"):
        with pytest.raises(UserError, match=r"cache is a file: name a folder by QLORA_LIGHTNING_CACHE\.$"):
            main([action])
