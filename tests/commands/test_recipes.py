"""``recipes`` lists and copies the configs of the package."""

import pytest

from qlora_lightning.cli import main
from qlora_lightning.commands import recipes


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


@pytest.fixture
def run(here, capsys):
    """Run the command; return what it printed."""

    def run(*arguments, code=0):
        assert main(["recipes", *arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code == 2 else captured.out

    return run


def test_recipes_are_listed_with_their_first_comment(run):
    lines = [line.split(maxsplit=1) for line in run().splitlines()]
    assert lines[1:3] == [["llama3-alpaca"], ["quickstart", "Teach it JSON."]]


def test_copy_writes_config_and_data_and_keeps_a_file_that_differs(here, run):
    for name in ("quickstart", "quickstart.yaml"):  # again changes nothing
        out = run("copy", name)
        assert out.endswith("Now run: qlora-lightning fit --config configs/quickstart.yaml\n")
        assert sorted(str(file.relative_to(here)) for file in here.rglob("*.*")) == [
            "configs/quickstart.yaml",
            "configs/quickstart/sub/val.jsonl",
            "configs/quickstart/train.jsonl",
        ]
    mine = here / "configs" / "quickstart" / "train.jsonl"
    mine.write_text("mine")
    (here / "configs" / "quickstart.yaml").unlink()
    assert "configs/quickstart/train.jsonl exists here and differs" in run("copy", "quickstart", code=2)
    assert mine.read_text() == "mine"
    assert not (here / "configs" / "quickstart.yaml").exists()
    run("copy", "quickstart", "--force")
    assert mine.read_text() == "{}\n"
