"""``report``: a table and a page of one run or several, as JSON too, without overwriting what others wrote."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from qlora_lightning.cli import main as cli
from qlora_lightning.commands.report import main
from tests.report.conftest import CONFIG, write_run


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Write a run folder of one step, which has no curves to draw, under runs/, and go where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda name, **changes: write_run(tmp_path / "runs" / name, steps=1, **changes)


def rows_of(out):
    """Return the cells of what is printed as a table."""
    lines = [re.split("[│┃]", line) for line in out.splitlines() if line[:1] in ("│", "┃")]
    return [[cell.strip() for cell in line[1:-1]] for line in lines]


def test_a_run_gets_its_page_again_and_a_table(make_run, capsys):
    folder = make_run("one")
    assert cli(["report", "runs/one"]) == 0
    out = capsys.readouterr().out
    assert rows_of(out) == [
        ["run", "one"],
        ["status", "finished"],
        ["validation loss", "0.4500"],
        ["token accuracy", "90.0%"],
        ["training loss, last", "2.0000"],
        ["tokens/s, median", "50"],
        ["peak memory", "1.50\u00a0GiB"],
        ["wall time, h:mm:ss", "0:01:30"],
        ["optimizer steps", "20"],
        ["tokens", "2,000"],
    ]
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
        *[["run", "one", "two"], ["status", "finished", "killed"], ["validation loss", "0.4500", "0.2500"]]
    ]
    assert not (tmp_path / "runs/one/report.html").exists()
    found = json.loads((tmp_path / "both.json").read_text())
    assert (found["format"], found["format_version"]) == ("qlora_lightning report", 1)
    assert found["differing_settings"] == {"model.rank": [8, 16]}
    assert [run["results"]["val_loss"] for run in found["runs"]] == [0.45, 0.25]
    assert [run["folder"] for run in found["runs"]] == ["runs/one", "runs/two"]


def test_the_examples_of_the_help_run_and_need_no_torch(make_run, capsys, tmp_path):
    for name in ("quickstart", "a", "b"):
        make_run(name)
    with pytest.raises(SystemExit):
        main(["--help"])
    examples = re.findall(r"^  qlora-lightning (report .*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(examples) == 2
    program = "import sys\nfrom qlora_lightning.cli import main\n"
    program += "".join(f"assert main({shlex.split(example)}) == 0\n" for example in examples)
    program += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "a-and-b.html").exists()
    assert (tmp_path / "a-and-b.json").exists()
