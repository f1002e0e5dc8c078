import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from qlora_lightning.report.page import render_comparison, render_run, result_table, write_run_page
from qlora_lightning.report.run import read_run

VOID = {"meta", "br", "path", "line"}
HOSTILE = "</pre></script><script>alert('1')</script><img src=x onerror=alert(1)>&amp;\" onmouseover=\"x"
REFERENCES = ("http:", "https:", "src=", "href=", "url(", "@import", "@font-face", "fetch(", "XMLHttp")


class Reader(HTMLParser):
    """Collects elements and texts, and insists that every tag is closed where it should be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text, self.scripts, self.headings = [], [], "", [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_run_has_every_section_and_a_curve_of_each_kind(make_run):
    page = Reader(render_run(read_run(make_run())))
    assert page.headings == [
        *["Curves", "Before and after", "Samples", "To look at", "What was trained on what", "Data", "Machine"],
        *["Versions and fingerprints", "To do it again"],
    ]
    charts = [json.loads(figure["data-curves"]) for figure in page.of("figure")]
    assert [[curve["label"] for curve in chart["curves"]] for chart in charts] == [
        ["training, mean of 5 steps", "base, validation", "validation"],
        ["learning rate"],
        ["gradient norm, mean of 5 steps", "clipped to 1"],
        ["tokens/s, mean of 5 steps"],
        ["peak RSS", "private"],
    ]
    assert all(svg["aria-label"] for svg in page.of("svg") if svg.get("role") == "img")
    for told in (
        "UserWarning: slow",
        "× 3",
        "qlora-lightning fit --config a.yaml",
        "2.000 → 0.450",
        "1 ✓",
        "1234567890",
    ):
        assert told in page.text


def test_whatever_the_run_holds_is_text(make_run):
    sample = dict.fromkeys(("prompt", "expected", "base", "adapter"), HOSTILE)
    config = {"model": {HOSTILE: HOSTILE, "rank": 8}, "data": {"train": HOSTILE}}
    changes = {
        "comparison": {"base": {HOSTILE: 1.0}, "adapter": {HOSTILE: 1.0}, "samples": [sample]},
        "warnings": [{"text": HOSTILE, "count": 1}],
        "error": HOSTILE,
        "command": HOSTILE,
        "data": {"files": {"train": HOSTILE}, "splits": {}, "hashes": {}},
    }
    one = make_run("a", config=config, status="failed", **changes)
    other = make_run("<b>&", config={"model": {"rank": HOSTILE}})
    (one / "metrics.csv").write_text(f'step,train_loss,"{HOSTILE.replace(chr(34), "")}"\n0,1,1\n1,2,2\n')
    runs = [read_run(one), read_run(other, "<b>&")]
    for html in (render_run(runs[0]), render_comparison(runs)):
        page = Reader(html)
        assert len(page.scripts) == 1
        assert not {"img", "a", "iframe", "b onmouseover"} & {tag for tag, _ in page.elements}
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert HOSTILE in page.text


def test_it_needs_nothing_beside_itself_and_runs_one_script_only(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b"))]
    for html in (render_run(runs[0]), render_comparison(runs)):
        assert not [reference for reference in REFERENCES if reference in html]
        page = Reader(html)
        (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv")]
        (script,) = page.scripts
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        assert "prefers-color-scheme: dark" in html


def test_a_page_is_small_however_long_the_run_was(make_run):
    assert len(render_run(read_run(make_run(steps=20_000)))) < 400_000


@pytest.mark.parametrize(
    "text", ["step,train_loss\n", "step,train_loss\n0,nan\n1,inf\n", "step,train_loss\n0,1\n1,2.5"]
)
def test_a_run_that_has_hardly_begun_has_a_page(make_run, text):
    folder = make_run(manifest=False, metrics=False)
    (folder / "metrics.csv").write_text(text)
    page = Reader(render_run(read_run(folder)))
    assert len(page.of("figure")) == (1 if "0,1" in text else 0)
    assert "of an earlier version" in page.text


def test_lives_are_told_where_there_were_several(make_run):
    lives = [
        {"started": "2026-11-25T10:00:00+00:00", "seconds": 90.0, "from_step": 0, "to_step": 12, "status": "running"},
        {"started": "2026-11-25T11:00:00+00:00", "seconds": 30.0, "from_step": 10, "to_step": 20, "status": "finished"},
    ]
    page = Reader(render_run(read_run(make_run(lives=lives))))
    assert "2026-11-25 11:00:00 UTC" in page.text
    assert "10 to 20" in page.text


def test_several_runs_are_compared_in_one_picture(make_run):
    config = {"model": {"rank": 16}, "data": {"train": "rows.jsonl"}}
    runs = [read_run(make_run("a")), read_run(make_run("b", config=config, comparison=None, peak_memory_gib={}))]
    page = Reader(render_comparison(runs))
    assert page.headings == ["Results", "Curves", "Settings that differ"]
    loss = json.loads(page.of("figure")[0]["data-curves"])
    assert [curve["label"] for curve in loss["curves"]] == ["a", "b"]
    assert [attributes.get("title") for attributes in page.of("td")].count("the best") == 2
    assert re.search(r"model\.rank\s*8\s*16", re.sub(r"\s+", " ", page.text))
    assert result_table(runs)[0] == ("validation loss", [("0.4500", True), ("0.5500", False)])


def test_the_page_is_written_whole(make_run):
    folder = make_run()
    assert write_run_page(folder) == folder / "report.html"
    assert not list(folder.glob("*.unfinished"))
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")


def test_figures_of_any_size_are_shown(make_run):
    comparison = {"base": {"loss": 8e307, "share": -8e307}, "adapter": {"loss": -8e307, "share": 8e307}, "samples": []}
    huge = {"steps": 2**62, "tokens": 2**62, "seconds": 1e308}
    folder = make_run(comparison=comparison, progress=huge, peak_memory_gib={"peak_rss_gib": 1e308})
    (folder / "plan.json").write_text('{"predicted": {"peak_bytes": 1e308}, "measured": {"peak_bytes": 1e308}}')
    run = read_run(folder)
    assert "<svg" in render_run(run)
    assert "<svg" in render_comparison([run, run])
