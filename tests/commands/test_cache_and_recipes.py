"""`cache` lists and clears what is kept for the next start; `recipes` lists and copies the configs of the package."""

import pytest

from qlora_lightning.base.cache import cached_folder
from qlora_lightning.cli import main
from qlora_lightning.commands import recipes


@pytest.fixture
def run(capsys):
    """Run a command; return what it printed."""

    def run(*arguments, code=0):
        assert main(list(arguments)) == code
        captured = capsys.readouterr()
        return captured.err if code == 2 else captured.out

    return run


@pytest.fixture
def folders(cache):
    def build(folder):
        (folder / "weights").write_bytes(bytes(2000))

    return [
        cached_folder("unpacked", {}, build, "smol.gguf"),
        cached_folder("quantized", {}, build, "package:smol nf4"),
    ]


def test_list_names_every_entry_and_the_total(folders, cache, run):
    lines = run("cache", "list").splitlines()
    assert {tuple(line.split()[:4]) for line in lines[1:3]} == {
        ("unpacked", "smol.gguf", "2", "kB"),
        ("quantized", "package:smol", "nf4", "2"),
    }
    assert {line.split()[-1] for line in lines[1:3]} == {str(folder) for folder in folders}
    assert lines[3] == f"total 4 kB in {cache}"


def test_clear_removes_what_was_asked_for_and_says_what_it_freed(folders, run):
    out = run("cache", "clear", "--kind", "quantized")
    assert [folder.exists() for folder in folders] == [True, False]
    assert str(folders[1]) in out
    assert out.endswith("Removed 1, freed 2 kB.\n")
    run("cache", "clear")
    assert not folders[0].exists()
    assert "nothing to clear" in run("cache", "clear")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and a package with two recipes of which one has data."""
    package = tmp_path / "package"
    (package / "quickstart" / "sub").mkdir(parents=True)
    (package / "quickstart.yaml").write_text("# Teach it JSON.\n# More.\nmodel:\n  rank: 8\n")
    (package / "quickstart" / "train.jsonl").write_text("{}\n")
    (package / "quickstart" / "sub" / "val.jsonl").write_text("{}\n")
    (package / "llama3-alpaca.yaml").write_text("model: {}\n")
    monkeypatch.setattr(recipes, "recipes_folder", lambda: package)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_recipes_are_listed_with_their_first_comment(here, run):
    lines = [line.split(maxsplit=1) for line in run("recipes").splitlines()]
    assert lines[1:3] == [["llama3-alpaca"], ["quickstart", "Teach it JSON."]]


def test_copy_writes_config_and_data_and_keeps_a_file_that_differs(here, run):
    for name in ("quickstart", "quickstart.yaml"):  # again changes nothing
        out = run("recipes", "copy", name)
        assert out.endswith("Now run: qlora-lightning fit --config configs/quickstart.yaml\n")
        assert sorted(str(file.relative_to(here)) for file in here.rglob("*.*")) == [
            "configs/quickstart.yaml",
            "configs/quickstart/sub/val.jsonl",
            "configs/quickstart/train.jsonl",
        ]
    mine = here / "configs" / "quickstart" / "train.jsonl"
    mine.write_text("mine")
    (here / "configs" / "quickstart.yaml").unlink()
    assert "configs/quickstart/train.jsonl exists here and differs" in run("recipes", "copy", "quickstart", code=2)
    assert mine.read_text() == "mine"
    assert not (here / "configs" / "quickstart.yaml").exists()
    run("recipes", "copy", "quickstart", "--force")
    assert mine.read_text() == "{}\n"
