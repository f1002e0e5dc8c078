"""``recipes`` lists and copies the configs of the package."""

from pathlib import Path

import pytest

from qlora_lightning.cli import main
from tests.equality import contents

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; return what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        assert main(["recipes", *arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code == 2 else captured.out

    return run


def test_recipes_are_listed_with_their_first_comment(run):
    first = (ROOT / "configs" / "quickstart.yaml").read_text().partition("\n")[0].removeprefix("# ")
    assert f"quickstart {first}" in " ".join(run().split())


def test_copy_writes_config_and_data_and_keeps_a_file_that_differs(tmp_path, run):
    for name in ("quickstart", "quickstart.yaml"):  # again changes nothing
        out = run("copy", name)
        assert out.endswith("Now run: qlora-lightning fit --config configs/quickstart.yaml\n")
        copied = contents(tmp_path / "configs")
        assert {"quickstart.yaml", "quickstart/train.jsonl", "quickstart/val.jsonl"} <= copied.keys()
        assert copied.items() <= contents(ROOT / "configs").items()
    mine = tmp_path / "configs" / "quickstart" / "train.jsonl"
    mine.write_text("mine")
    (tmp_path / "configs" / "quickstart.yaml").unlink()
    assert "configs/quickstart/train.jsonl exists here and differs" in run("copy", "quickstart", code=2)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "configs" / "quickstart.yaml").exists()
    run("copy", "quickstart", "--force")
    assert contents(tmp_path / "configs") == copied
