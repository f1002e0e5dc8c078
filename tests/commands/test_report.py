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
    """Write a run folder under runs/, and go where it lies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def make(name, rank=8, loss=0.5, **manifest):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        speed = 100 * rank
        (folder / "metrics.csv").write_text(
            f"step,train_loss,tokens_per_second,val_loss\n0,2.0,{speed},\n1,1.0,{speed},\n1,,,{loss}\n"
        )
        config = {"model": {"rank": rank}, "trainer": {"default_root_dir": f"runs/{name}"}}
        write_manifest(
            folder, {"status": "finished", "config": config, "progress": {"steps": 2, "seconds": 90}} | manifest
        )
        return folder

    return make


def rows_of(out):
    """Give the cells of what is printed as a table."""
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
        ["tokens/s", "800"],
        ["wall time", "90 s"],
    ]
    assert out.rstrip().endswith("Page: runs/one/report.html")
    assert "exact match" not in out
    first = (folder / "report.html").read_bytes()
    assert cli(["report", "runs/one", "runs/../runs/one/"]) == 0  # one run, however often it is named
    assert (folder / "report.html").read_bytes() == first


def test_several_runs_are_compared_as_a_page_and_as_json(make_run, capsys, tmp_path):
    make_run("one")
    make_run("two", rank=16, loss=0.25, status="running")
    assert cli(["report", "runs/one", "runs/two", "--json", "both.json"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("Page: comparison.html")
    assert rows_of(out)[:2] == [["run", "one", "two"], ["status", "finished", "killed"]]
    assert ["validation loss", "0.5000", "0.2500"] in rows_of(out)
    assert not (tmp_path / "runs/one/report.html").exists()
    found = json.loads((tmp_path / "both.json").read_text())
    assert (found["format"], found["format_version"]) == ("qlora_lightning report", 1)
    assert found["differing_settings"] == {"model.rank": [8, 16]}
    assert [run["results"]["val_loss"] for run in found["runs"]] == [0.5, 0.25]
    assert [run["folder"] for run in found["runs"]] == ["runs/one", "runs/two"]
    assert cli(["report", "runs/two", "runs/one", "--json", "both.json", "--force"]) == 0


def test_exact_match_is_in_the_table_where_it_was_measured(make_run, capsys):
    folder = make_run("one")
    (folder / "evaluation.json").write_text('{"metrics": {"exact_match": {"adapter": {"value": 0.97}}}}')
    main(["runs/one"])
    assert ["exact match", "97.0%"] in rows_of(capsys.readouterr().out)


def test_other_scores_and_test_rows_are_in_the_table_and_on_the_page(make_run, capsys, tmp_path):
    folder = make_run("one")
    metrics = {name: {"base": {"value": 0.1}, "mine": {"value": 0.25}} for name in ("loss", "numeric_match", "rouge_l")}
    evaluation = {"metrics": metrics, "scores": ["numeric_match", "rouge_l"], "split": "test", "rows": 7}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    make_run("two")
    main(["runs/one", "runs/two", "--out", "both.html", "--json", "both.json"])
    out = capsys.readouterr().out
    assert rows_of(out)[2:5] == [
        ["validation loss", "0.5000", "0.5000"],
        ["test loss", "0.2500", "–"],
        ["numeric match, test rows", "25.0%", "–"],
    ]
    page = (tmp_path / "both.html").read_text()
    for heading in ("test loss", "numeric match, test rows", "ROUGE-L, test rows"):
        assert f"<td>{heading}</td>" in page
    one, two = (run["results"] for run in json.loads((tmp_path / "both.json").read_text())["runs"])
    assert one["test_numeric_match"] == 0.25
    assert "test_numeric_match" not in two
    main(["runs/one"])
    page = (folder / "report.html").read_text()
    assert "<th>7 test rows</th><th>base</th><th>mine</th><th>difference</th>" in page
    assert "test loss, base\u00a0→\u00a0adapter" in page


@pytest.mark.parametrize("count", [1, 4, 9])
def test_nothing_is_cut_in_a_terminal_of_80_columns(count, make_run, monkeypatch, capsys):
    names = [f"run-{number}-with-a-long-name" for number in range(count)]
    for name in names:
        metrics = {metric: {"adapter": {"value": 0.25}} for metric in ("loss", "exact_match")}
        evaluation = {"metrics": metrics, "rows": 1319, "adapters": {"adapter": f"runs/{name}/adapter"}}
        (make_run(name) / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.setenv("COLUMNS", "80")
    main([*(f"runs/{name}" for name in names), "--out", "page.html"])
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("0.5000") == count


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_a_file_of_somebody_else_is_kept_unless_forced(make_run, option, tmp_path):
    make_run("one")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"{option} mine\.txt exists already"):
        main(["runs/one", option, "mine.txt"])
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "runs/one/report.html").exists()
    assert main(["runs/one", option, "mine.txt", "--force"]) == 0
    assert (tmp_path / "mine.txt").read_text() != "mine"


def test_a_report_html_of_somebody_else_in_the_run_folder_is_kept_too(make_run):
    (make_run("one") / "report.html").write_text("<p>notes</p>")
    with pytest.raises(UserError, match="exists already"):
        main(["runs/one"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Name a run folder"),
        (["runs/none"], "There is no folder runs/none"),
        (["runs"], r"runs holds no run.*These folders in it do: runs/one\."),
        (["runs/one", "--out", "none/page.html"], "the folder none does not exist"),
        (["runs/one", "--out", "runs"], "is a folder"),
        (["runs/one", "--out", "/proc/x"], "cannot be written"),
        (["runs/one", "--jsn", "x"], "There is no option --jsn"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(make_run, capsys, arguments, words):
    make_run("one")
    assert cli(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
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
