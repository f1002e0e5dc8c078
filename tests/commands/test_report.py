"""``report``: a table and a page of one run or several, as JSON too, without overwriting what others wrote."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from qlora_lightning.cli import main as cli
from qlora_lightning.commands.report import main
from qlora_lightning.report.run import write_manifest
from qlora_lightning.support.errors import UserError


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """Write a small run folder under runs/, and go where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def make(name, rank=8, loss=0.5, **manifest):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,train_loss,val_loss\n1,1.0,\n1,,{loss}\n")
        config = {"model": {"rank": rank}, "trainer": {"default_root_dir": f"runs/{name}"}}
        write_manifest(
            folder, {"status": "finished", "config": config, "progress": {"steps": 2, "seconds": 90}} | manifest
        )
        return folder

    return make


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
        ["validation loss", "0.5000"],
        ["training loss, last", "1.0000"],
        ["wall time, h:mm:ss", "0:01:30"],
        ["optimizer steps", "2"],
    ]
    assert out.rstrip().endswith("Page: runs/one/report.html")
    first = (folder / "report.html").read_bytes()
    assert cli(["report", "runs/one"]) == 0
    assert (folder / "report.html").read_bytes() == first


def test_several_runs_are_compared_as_a_page_and_as_json(make_run, capsys, tmp_path):
    make_run("one")
    make_run("two", rank=16, loss=0.25, status="running")
    assert cli(["report", "runs/one", "runs/two", "--json", "both.json"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("Page: comparison.html")
    assert rows_of(out)[:3] == [
        *[["run", "one", "two"], ["status", "finished", "killed"], ["validation loss", "0.5000", "0.2500"]]
    ]
    assert not (tmp_path / "runs/one/report.html").exists()
    found = json.loads((tmp_path / "both.json").read_text())
    assert (found["format"], found["format_version"]) == ("qlora_lightning report", 1)
    assert found["differing_settings"] == {"model.rank": [8, 16]}
    assert [run["results"]["val_loss"] for run in found["runs"]] == [0.5, 0.25]
    assert [run["folder"] for run in found["runs"]] == ["runs/one", "runs/two"]


def test_nothing_is_cut_in_a_terminal_of_80_columns(make_run, monkeypatch, capsys):
    names = [f"run-{number}-with-a-long-name" for number in range(9)]
    for name in names:
        metrics = {metric: {"adapter": {"value": 0.25}} for metric in ("loss", "exact_match")}
        (make_run(name) / "evaluation.json").write_text(json.dumps({"metrics": metrics, "rows": 1319}))
    monkeypatch.setenv("COLUMNS", "80")
    main([f"runs/{name}" for name in names])
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("0.2500") == len(names)


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_a_named_file_that_exists_is_kept_unless_forced(make_run, option, tmp_path):
    make_run("one")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{option} mine\.txt exists already"):
        main(["runs/one", option, "mine.txt"])
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "runs/one/report.html").exists()
    assert main(["runs/one", option, "mine.txt", "--force"]) == 0
    assert (tmp_path / "mine.txt").read_text() != "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: RUN"),
        (["runs/none"], "runs/none holds no run"),
        (["runs/one", "--out", "none/page.html"], "the folder none does not exist"),
        (["runs/one", "--jsn", "x"], "--jsn"),
    ],
)
def test_what_is_wrong_is_reported_in_a_line(make_run, capsys, arguments, words):
    make_run("one")
    assert cli(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


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
