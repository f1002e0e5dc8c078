"""``report``: a table and a page of one run or several, as JSON too, without overwriting what others wrote."""

import json
import re
import subprocess
import sys

import pytest

from qlora_lightning.cli import main as cli
from tests.report.conftest import CONFIG, write_run


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Write a run folder of one step, which has no curves to draw, under runs/, and go where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda name, **changes: write_run(tmp_path / "runs" / name, steps=1, **changes)


def rows_of(out):
    lines = [re.split("[│┃]", line) for line in out.splitlines() if line[:1] in ("│", "┃")]
    return [[cell.strip() for cell in line[1:-1]] for line in lines]


def test_a_run_gets_its_page_again_and_a_table(make_run, capsys):
    folder = make_run("one")
    assert cli(["report", "runs/one"]) == 0
    out = capsys.readouterr().out
    expected = {"status": "finished", "validation loss": "0.4500", "token accuracy": "90.0%", "optimizer steps": "20"}
    assert {**dict(rows_of(out)), **expected} == dict(rows_of(out))
    assert out.rstrip().endswith("Page: runs/one/report.html")
    first = (folder / "report.html").read_bytes()
    assert cli(["report", "runs/one"]) == 0
    assert (folder / "report.html").read_bytes() == first


def test_several_runs_are_compared_as_a_page_and_as_json(make_run, capsys, tmp_path):
    make_run("one")
    config = {**CONFIG, "model": {**CONFIG["model"], "rank": 16}}
    make_run("two", config=config, status="running", evaluation={"metrics": {"loss": {"adapter": {"value": 0.25}}}})
    assert cli(["report", "runs/one", "runs/two", "--json", "both.json"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("Page: comparison.html")
    assert rows_of(out)[:3] == [
        *[["run", "runs/one", "runs/two"], ["status", "finished", "running"], ["validation loss", "0.4500", "0.2500"]]
    ]
    assert ["wall time, h:mm:ss", "0:01:30", "–"] in rows_of(out)
    assert not (tmp_path / "runs/one/report.html").exists()
    found = json.loads((tmp_path / "both.json").read_text())
    assert (found["format"], found["format_version"]) == ("qlora_lightning report", 1)
    assert found["differing_settings"] == {"model.rank": [8, 16]}
    assert [run["results"]["val_loss"] for run in found["runs"]] == [0.45, 0.25]
    assert [run["folder"] for run in found["runs"]] == ["runs/one", "runs/two"]
    (tmp_path / "comparison.html").write_text("of another tool")
    assert cli(["report", "runs/one", "runs/two"]) == 2
    assert (tmp_path / "comparison.html").read_text() == "of another tool"


def test_it_needs_no_torch(make_run, tmp_path):
    make_run("one")
    program = "import sys\nfrom qlora_lightning.cli import main\nassert main(['report', 'runs/one']) == 0\n"
    program += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
