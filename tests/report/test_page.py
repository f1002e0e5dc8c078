"""The report of a run, and of several: what a person reads, that nothing acts or leaves the page, and the command."""

import json
import re

import pytest

from qlora_lightning.cli import main
from qlora_lightning.report import read_metrics, read_run, render_report, write_manifest, write_run_page
from qlora_lightning.report.charts import COLOURS, charts_of
from qlora_lightning.support.console import show_controls
from qlora_lightning.support.errors import UserError
from tests.errors import rejects
from tests.markup import Reader
from tests.processes import run_python
from tests.report.conftest import CONFIG, MANIFEST, write_run

HOSTILE = "\x1b]0;</pre></script><script>alert('1')</script><img src=x onerror=alert(1)>&amp;\" onmouseover=\"x"
REFERENCES = ("http:", "https:", "src=", ' href="', "url(h", "@import", "@font-face", "<script")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs: one of a hundred steps, and one whose steps have twice the tokens."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", steps=100)
    write_run(folder / "b", tokens_per_step=200, config={"model": {"rank": 16}})
    return [read_run(folder / name) for name in ("a", "b")]


@pytest.fixture(scope="module")
def pages(runs):
    return {"one": render_report(runs[:1]), "several": render_report(runs)}


def test_a_run_has_every_section_and_its_facts(pages):
    page = Reader(pages["one"])
    assert page.texts("h2") == [
        *["In short", "What to do next", "Results", "Curves", "Before and after", "Samples"],
        *["What was trained on what", "Data", "Attempts", "Machine, versions and fingerprints", "To do it again"],
        "Config",
    ]
    for words in (
        *("qlora-lightning fit --config a.yaml", "1 ✓", "1234567890abcdef1234-dirty"),
        "base package:tiny, quantization nf4, double_quant true",
        *("target_modules [q_proj]", "1,000 of 50,000 (2.00%)"),
        "20 optimizer steps, 40 planned, 2,000 tokens, 500 labeled tokens",
        "learning_rate 0.001, gradient_clip_val 1.0, batch",
        *("step-000020.ckpt, val_loss 0.5000", "train: 12 rows, 400 tokens", "empty answer", "seed"),
        *("name A CPU, memory_gib 16.0", "ab" * 8, "torch 2.13.0"),
        *("2026-11-25 11:00:00", "8 to 20", "0:01:00"),
    ):
        assert words in page.text


def test_runs_are_compared_by_tokens(runs, pages):
    page = Reader(pages["several"])
    assert page.texts("h2") == ["Results", "Curves", "Settings that differ"]
    assert "a · b" in page.text
    assert "model.rank" in page.text
    loss = charts_of(runs)[1]
    assert [(curve.label, curve.colour) for curve in loss.curves] == [("a", COLOURS[0]), ("b", COLOURS[1])]
    assert loss.x_label == "tokens trained on"
    assert [x for x, _ in loss.curves[1].points[:2]] == [200, 400]


def test_whatever_the_run_holds_is_text(make_run):
    sample = dict.fromkeys(("prompt", "expected", "base", "adapter"), HOSTILE)
    sides = {"base": {"value": 1.0}, "adapter": {"value": 1.0}, "difference": {"value": 0.0}}
    hostile = {"config": {"model": {HOSTILE: HOSTILE, "rank": 8}, "data": {"train": HOSTILE}}, "error": HOSTILE}
    hostile |= {"evaluation": {"metrics": {HOSTILE: sides}, "samples": [sample]}, "command": HOSTILE}
    one = make_run(status="failed", data={"files": {"train": HOSTILE}, "splits": {}, "hashes": {}}, **hostile)
    other = make_run("<b>&", config={"model": {"rank": HOSTILE}})
    (one / "metrics.csv").write_text(f'step,train_loss,"{HOSTILE.replace(chr(34), "")}"\n0,1,1\n1,2,2\n')
    runs = [read_run(one), read_run(other, "<b>&")]
    for html in (render_report(runs[:1]), render_report(runs)):
        page = Reader(html)
        assert not {"script", "img", "a", "iframe"} & {tag for tag, _ in page.elements}
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert show_controls(HOSTILE) in page.text
        assert "\x1b" not in html


@pytest.mark.parametrize("name", ["one", "several"])
def test_a_page_needs_nothing_beside_itself_and_runs_no_script(pages, name):
    assert not [reference for reference in REFERENCES if reference in pages[name]]
    page = Reader(pages[name])
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "light-dark(" in pages[name]
    assert all(figure["aria-label"] for figure in page.of("figure"))


def test_a_page_is_small_however_long_the_run_was_and_is_made_of_whatever_there_is(make_run):
    assert len(render_report([read_run(make_run(steps=20_000))])) < 400_000
    bare = make_run("bare", evaluation={})
    write_manifest(bare, {"status": "running", "config": CONFIG})
    (bare / "metrics.csv").write_text("step,train_loss\n")
    page = Reader(write_run_page(bare).read_text())
    assert page.texts("h2") == ["What was trained on what", "Config"]
    assert "still training, or killed" in page.text


SOURCES = [  # what `data.train` names, how the first line of a page says it, and the cells of its row of facts
    ("a.jsonl", "12 rows of a.jsonl.", "traina.jsonl"),
    ({"path": "a.jsonl", "rows": 12}, "12 rows of a.jsonl.", "traina.jsonl, the first 12 rows"),
    (
        [{"path": "a.jsonl", "weight": 3, "format": "alpaca"}, {"path": "b.csv", "rows": 1}],
        "12 rows of a.jsonl and b.csv.",
        "traina.jsonl, weight 3, format alpaca; b.csv, the first 1 row",
    ),
]


@pytest.mark.parametrize(("train", "sentence", "facts"), SOURCES)
def test_files_are_named_as_a_person_would(make_run, train, sentence, facts):
    data = {**MANIFEST["data"], "files": {"train": train}}
    page = Reader(render_report([read_run(make_run(data=data))]))
    assert f"LoRA of rank 8 on package:tiny, trained on {sentence}" in page.text
    assert facts in page.text


def test_what_cannot_be_seen_is_shown():
    assert show_controls("a\tb\nc") == "a⇥b\nc"
    assert show_controls("\x1b[31m\0\x7f\x9b") == "␛[31m␀␡\\x9b"
    assert show_controls("\N{RIGHT-TO-LEFT OVERRIDE}x\N{ZERO WIDTH SPACE}") == "\\u202ex\\u200b"
    assert show_controls("\U000e0041") == "\\U000e0041"
    assert show_controls("👩🏽‍🚀 é 日本") == "👩🏽‍🚀 é 日本"


@pytest.mark.parametrize(
    ("name", "content", "key", "facts"),
    [
        ("manifest.json", "{ [", "manifest.json", ["is not JSON"]),
        ("evaluation.json", 100_000 * "[", "evaluation.json", ["is not JSON"]),
        ("evaluation.json", "[]", "evaluation.json", ["expected a JSON object"]),
        ("manifest.json", {"format_version": 2}, "format_version", ["is 2", "update"]),
        ("manifest.json", {"progress": [1]}, "progress", ["is [1]", "object"]),
        ("manifest.json", {"attempts": [{"started": 5}]}, "started", ["attempts: started is 5", "str"]),
        ("evaluation.json", '{"metrics": {"loss": [2]}}', "metrics", ["metrics is {'loss': [2]}"]),
        ("metrics.csv", "step,loss\n0,high\n", "metrics.csv", ["could not convert string to float: 'high'"]),
    ],
)
def test_a_damaged_file_is_named_with_its_key(make_run, name, content, key, facts):
    folder = make_run()
    if isinstance(content, dict):
        content = json.dumps({"format": "qlora_lightning manifest", "format_version": 1} | content)
    (folder / name).write_text(content)
    with rejects(key, str(folder / name), *facts):
        read_run(folder)


def places_of(content):
    """Yield each object or list in some JSON with one of its keys or indices."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, dict | list):
            yield from places_of(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "evaluation.json"])
def test_a_value_of_another_kind_is_named_or_shown(make_run, name):
    folder, messages = make_run(steps=0), list[str]()
    content = json.loads((folder / name).read_text())
    for place, key in list(places_of(content)):
        kept = place[key]
        for value in (5, 1e308, 10**400, "x", True, None, [], [1], {}, {"x": 1}):
            place[key] = value
            (folder / name).write_text(json.dumps(content))
            try:
                render_report([read_run(folder)])
                render_report([read_run(folder)] * 2)
            except UserError as error:
                messages.append(str(error))
        place[key] = kept
    assert len(messages) > 100
    assert all(str(folder / name) in message for message in messages)


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        ("step,train_loss,val_loss\n0,2.5,\n1,,1.5\n", {"train_loss": [(1, 2.5)], "val_loss": [(2, 1.5)]}),
        ("step,loss\n0,1.0\n1,nan\n2,inf\n4\n5,2.0\n7,0.12", {"loss": [(1, 1.0), (6, 2.0)]}),
        ("step,loss\n0,1e308\n1,-1e308\n2,1.0\n", {"loss": [(3, 1.0)]}),
        ("step,lo", {}),
        ("", {}),
    ],
)
def test_half_a_line_and_what_is_no_number_are_left_out_of_metrics(tmp_path, lines, columns):
    file = tmp_path / "metrics.csv"
    assert read_metrics(file) == {}
    file.write_text(lines)
    assert read_metrics(file) == columns


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def rows_of(out):
    lines = [re.split("[│┃]", line) for line in out.splitlines() if line[:1] in ("│", "┃")]
    return [[cell.strip() for cell in line[1:-1]] for line in lines]


def test_a_run_gets_its_page_again_and_a_table(make_run, capsys):
    folder = make_run("one", steps=1)
    assert main(["report", "runs/one"]) == 0
    out = capsys.readouterr().out
    expected = {"status": "finished", "validation loss": "0.4500", "token accuracy": "90.0%", "optimizer steps": "20"}
    assert {**dict(rows_of(out)), **expected} == dict(rows_of(out))
    assert out.rstrip().endswith("Page: runs/one/report.html")
    first = (folder / "report.html").read_bytes()
    assert main(["report", "runs/one"]) == 0
    assert (folder / "report.html").read_bytes() == first


def test_several_runs_are_compared_as_a_page_and_as_json(make_run, capsys, tmp_path):
    make_run("one", steps=1)
    config = {**CONFIG, "model": {**CONFIG["model"], "rank": 16}}
    evaluation = {"metrics": {"loss": {"adapter": {"value": 0.25}}}}
    data = {**MANIFEST["data"], "hashes": {"val": "12" * 32}}
    make_run("two", steps=1, config=config, status="running", evaluation=evaluation, data=data)
    assert main(["report", "runs/one", "runs/two", "--json", "both.json"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("Page: comparison.html")
    first_rows = [["run", "runs/one", "runs/two"], ["status", "finished", "running"]]
    first_rows.append(["other validation rows, not comparable", "efefefef", "12121212"])
    assert rows_of(out)[:4] == [*first_rows, ["validation loss", "0.4500", "0.2500"]]
    assert ["wall time, h:mm:ss", "0:01:30", "–"] in rows_of(out)
    assert not (tmp_path / "runs/one/report.html").exists()
    found = json.loads((tmp_path / "both.json").read_text())
    assert (found["format"], found["format_version"]) == ("qlora_lightning report", 1)
    assert found["differing_settings"] == {"model.rank": [8, 16]}
    assert [run["results"]["val_loss"] for run in found["runs"]] == [0.45, 0.25]
    assert [run["folder"] for run in found["runs"]] == ["runs/one", "runs/two"]
    (tmp_path / "comparison.html").write_text("of another tool")
    assert main(["report", "runs/one", "runs/two"]) == 2
    assert (tmp_path / "comparison.html").read_text() == "of another tool"


def test_the_command_needs_no_torch(make_run):
    make_run("one", steps=1)
    program = "import sys\nfrom qlora_lightning.cli import main\nassert main(['report', 'runs/one']) == 0\n"
    program += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    run_python("-c", program)
