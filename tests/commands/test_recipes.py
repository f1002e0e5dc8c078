from pathlib import Path

import pytest

from qlora_lightning.commands import recipes
from qlora_lightning.commands.recipes import main, recipes_folder
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


@pytest.mark.parametrize("argv", [[], ["list"]])
def test_list_shows_names_and_first_comments(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:3] == [["llama3-alpaca"], ["quickstart", "Teach it JSON."]]


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_copy_writes_config_and_data(name: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["copy", name]) == 0
    assert sorted(str(file.relative_to(here)) for file in here.rglob("*.*")) == [
        "configs/quickstart.yaml",
        "configs/quickstart/sub/val.jsonl",
        "configs/quickstart/train.jsonl",
    ]
    out = capsys.readouterr().out
    assert "wrote configs/quickstart/train.jsonl" in out
    assert out.endswith("Now run: qlora-lightning fit --config configs/quickstart.yaml\n")
    assert main(["copy", name]) == 0
    assert "configs/quickstart.yaml is there already" in capsys.readouterr().out


def test_a_file_that_differs_is_kept_unless_forced(here: Path) -> None:
    (here / "configs" / "quickstart").mkdir(parents=True)
    mine = here / "configs" / "quickstart" / "train.jsonl"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"configs/quickstart/train\.jsonl exists here and differs.*--force"):
        main(["copy", "quickstart"])
    assert mine.read_text() == "mine"
    assert not (here / "configs" / "quickstart.yaml").exists()
    assert main(["copy", "quickstart", "--force"]) == 0
    assert mine.read_text() == "{}\n"


def test_an_unknown_name_gets_the_nearest(here: Path) -> None:
    with pytest.raises(
        UserError, match=r"no recipe 'quickstrat': .* llama3-alpaca, quickstart\. Did you mean .*quickstart"
    ):
        main(["copy", "quickstrat"])
    assert list(here.iterdir()) == []


def test_recipes_lie_in_the_package_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "qlora_lightning"
    package.mkdir(parents=True)
    monkeypatch.setattr("qlora_lightning.__file__", str(package / "__init__.py"))
    assert recipes_folder() == tmp_path / "site" / "configs"
    (package / "recipes").mkdir()
    assert recipes_folder() == package / "recipes"


@pytest.mark.parametrize(("arguments", "words"), [(["bogus"], "invalid choice: 'bogus'"), (["copy"], "required: NAME")])
def test_mistakes_are_told_in_a_sentence(arguments, words):
    with pytest.raises(UserError, match=f"{words}.* See `qlora-lightning recipes"):
        main(arguments)
