"""The report of a run, and of several: what a person reads, and that nothing of it acts or leaves the page."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from qlora_lightning.report.charts import Chart, Curve, charts_of, charts_of_all, draw_charts, running_mean
from qlora_lightning.report.facts import findings, flatten, headline, next_steps, subject, write_setting
from qlora_lightning.report.page import render_comparison, render_run, write_run_page
from qlora_lightning.report.run import Run, read_run
from tests.markup import Reader
from tests.report.conftest import CONFIG

HOSTILE = "</pre></script><script>alert('1')</script><img src=x onerror=alert(1)>&amp;\" onmouseover=\"x"
REFERENCES = ("http:", "https:", "src=", ' href="', "url(h", "@import", "@font-face", "fetch(", "XMLHttp")


def labels(chart):
    return [curve.label for curve in chart.curves if curve.points]


def test_a_run_has_every_section_and_its_facts(make_run):
    folder = make_run()
    (folder / "plan.json").write_text(
        '{"predicted": {"peak_bytes": 1073741824}, "measured": {"peak_bytes": 1073741824}}'
    )
    page = Reader(render_run(read_run(folder)))
    assert page.texts("h2") == [
        *["In short", "Curves", "Before and after", "Samples", "What the adapter changes", "To look at"],
        *["What was trained on what", "Data", "Machine", "Versions and fingerprints", "To do it again"],
    ]
    assert all(figure["aria-label"] for figure in page.of("figure"))
    for words in (
        *("UserWarning: slow", "× 3", "qlora-lightning fit --config a.yaml", "1 ✓", "1234567890abcdef on main, with"),
        *("package:tiny, nf4 with double quantization", "on q_proj of 2 layers: 1,000 of 50,000 parameters (2.00%)"),
        *("20 optimizer steps, 2,000 tokens, 500 labelled tokens", "learning_rate 0.001, gradient_clip_val 1.0"),
        *("step-000020.ckpt, val_loss 0.5000", "1 bad rows of train were left out.", "empty answer", "seed"),
        *("max_length cut 5 labelled tokens away from train.", "A CPU, 16 GiB", "ab" * 8, "torch 2.13.0"),
        *("1.50 GiB: the most that the process held", "1.00 GiB, planned 1.00 GiB", "4.00% in layer 1", "2.5 of 8"),
    ):
        assert words in page.text
    assert [cell["title"] for cell in page.of("td") if cell.get("title")] == [
        *["q_proj of layer 0: 2.00%", "q_proj of layer 1: 4.00%"],
    ]


def test_the_first_screen_answers_what_it_learned_what_it_cost_and_what_comes_next(make_run):
    folder = make_run(config={**CONFIG, "data": {**CONFIG["data"], "test": "test.jsonl"}})
    score = {
        "base": {"value": 0.02},
        "adapter": {"value": 0.25},
        "difference": {"value": 0.23, "low": 0.2, "high": 0.3},
    }
    found = json.loads((folder / "evaluation.json").read_text())
    found["metrics"]["numeric_match"] = score
    (folder / "evaluation.json").write_text(json.dumps(found | {"scores": ["numeric_match"], "rows": 7}))
    run = read_run(folder)
    assert subject(run) == "LoRA of rank 8 on package:tiny, trained on rows.jsonl (12 rows)."
    assert headline(run) == [
        ("2.000 → 0.450", "validation loss, base\u00a0→\u00a0adapter"),
        ("2% → 25%", "numeric match, base\u00a0→\u00a0adapter"),
        ("20 of 40", "optimizer steps"),
        ("90 s", "wall time of the fit"),
        ("60", "tokens/s, median"),
        ("1.50 GiB", "peak memory of the process"),
    ]
    assert findings(run) == [
        "It learned: the validation loss fell from 2.000 of the base to 0.550 at step 20.",
        "The validation loss was still falling at the end: more steps may do better.",
        "It is better than the base: numeric match 23.0 points higher (95 % interval 20.0 to 30.0) on 7 "
        "validation rows.",
        "It uses 31% of its rank of 8: half the rank may learn as much.",
    ]
    commands = [command for _, command in next_steps(run)]
    assert commands[0] == f"qlora-lightning chat --adapter {folder}/adapter"
    assert commands[1] == f"qlora-lightning evaluate --adapter {folder}/adapter --split test --out {folder}-evaluated"
    stopped = read_run(make_run("b", status="stopped"))
    assert next_steps(stopped)[0][1] == "qlora-lightning fit --config a.yaml --ckpt_path last"


@pytest.mark.parametrize(
    ("losses", "difference", "words"),
    [
        ([1.0, 0.5, 0.8], {"value": -0.2, "low": -0.3, "high": 0.1}, ["rose again, to 0.800", "not clearly better"]),
        ([2.5, 2.4], {"value": 0.4, "low": 0.3, "high": 0.5}, ["It did not learn", "worse than the base: loss"]),
        ([], {"value": -0.5}, ["better than the base: loss 0.500 lower on 5 validation rows."]),
    ],
)
def test_what_went_wrong_is_found(losses, difference, words):
    loss = {"base": {"value": 2.0}, "adapter": {"value": 2.0 + difference["value"]}, "difference": difference}
    points = [(step, value) for step, value in enumerate(losses, start=1)]
    run = Run(
        Path("a"), "a", "finished", metrics={"val_loss": points}, evaluation={"metrics": {"loss": loss}, "rows": 5}
    )
    found = " ".join(findings(run))
    assert all(each in found for each in words)
    evaluation = {"metrics": {"loss": loss}, "adapters": {"mine": "runs/another/adapter"}}
    other = Run(Path("a"), "a", "finished", evaluation=evaluation)
    assert findings(other) == []  # of another run's adapter


def test_a_run_has_a_chart_of_each_kind(make_run):
    folder = make_run(steps=100)
    (folder / "plan.json").write_text(json.dumps({"predicted": {"peak_bytes": 3 * 1024**3}}))
    charts = charts_of(read_run(folder))
    assert {chart.title: labels(chart) for chart in charts} == {
        "Loss": ["training", "training, mean of 5 steps", "base, validation", "validation"],
        "Learning rate": ["learning rate"],
        "Gradient norm": ["gradient norm", "gradient norm, mean of 5 steps", "clipped to 1"],
        "Speed": ["tokens/s", "tokens/s, mean of 5 steps"],
        "Memory": ["peak", "planned"],
    }
    assert charts[4].curves[1].points == [(0, 3.0)]


def test_one_point_is_no_chart_and_what_users_log_is_one():
    points = [(step, 1.0) for step in range(1, 21)]
    run = Run("a", "a", "finished", metrics={"train_loss": points, "val_exact_match": [(10, 0.5)], "my_own": points})
    assert [drawn["title"] for drawn in draw_charts(charts_of(run))] == ["Loss", "My own"]
    assert draw_charts([Chart("Loss", "", [Curve("a", [])])]) == []


def test_the_mean_does_not_lag_behind():
    straight = [(float(step), 3.0 * step) for step in range(100)]
    assert [y for _, y in running_mean(straight)] == pytest.approx([y for _, y in straight])
    peak = [(step, float(step == 50)) for step in range(100)]
    assert [step for step, value in running_mean(peak) if value > 0.1] == [48, 49, 50, 51, 52]


def test_a_chart_is_drawn_the_same_each_time_with_the_points_in_their_places():
    chart = Chart("Loss", "nats", [Curve("a", [(1, 10.0), (3, 50.0), (5, 0.1)])], from_zero=False)
    (drawn,) = draw_charts([chart])
    assert drawn == draw_charts([chart])[0]
    assert drawn["unit"] == "nats · log scale"
    assert drawn["summary"] == "Loss over optimizer steps. a: from 10 to 0.1, between 0.1 and 50."
    kind, svg, left, right = drawn["drawings"][1]
    assert (kind, svg.count("<svg"), "prefers" in svg) == ("narrow", 1, False)
    path = re.search(r'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \n" [^>]*var\(--c0\)', svg)
    assert [float(place) / 400 for place in path.groups()] == pytest.approx([left, (left + right) / 2, right])
    assert re.findall(r">([\d,.]+)</text>", svg) == [*"12345", *("0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50")]


def test_runs_share_charts_and_are_compared_by_tokens_if_their_steps_differ(make_run):
    one, same = read_run(make_run("a")), read_run(make_run("same"))
    other = read_run(make_run("b", tokens_per_step=200, config={"model": {"rank": 16}}))
    loss = charts_of_all([one, same])[1]
    assert (labels(loss), [curve.colour for curve in loss.curves]) == (["a", "same"], [0, 1])
    assert loss.x_label == "optimizer steps"
    loss = charts_of_all([one, other])[1]
    assert loss.x_label == "tokens trained on"
    assert [x for x, _ in loss.curves[1].points[:2]] == [200, 400]
    page = Reader(render_comparison([one, other]))
    assert page.texts("h2") == ["Results", "Curves", "Settings that differ"]
    assert "a · b" in page.text
    assert "model.rank" in page.text


def test_whatever_the_run_holds_is_text(make_run):
    sample = dict.fromkeys(("prompt", "expected", "base", "adapter"), HOSTILE)
    metrics = {HOSTILE: {"base": {"value": 1.0}, "adapter": {"value": 1.0}}}
    one = make_run(
        config={"model": {HOSTILE: HOSTILE, "rank": 8}, "data": {"train": HOSTILE}},
        status="failed",
        evaluation={"metrics": metrics, "samples": [sample]},
        warnings=[{"text": HOSTILE, "count": 1}],
        error=HOSTILE,
        command=HOSTILE,
        data={"files": {"train": HOSTILE}, "splits": {}, "hashes": {}},
        adapter_updates={HOSTILE: [{"layer": 1, "ratio": 0.1, "rank": 8, "effective_rank": 4.0}]},
    )
    other = make_run("<b>&", config={"model": {"rank": HOSTILE}})
    (one / "metrics.csv").write_text(f'step,train_loss,"{HOSTILE.replace(chr(34), "")}"\n0,1,1\n1,2,2\n')
    runs = [read_run(one), read_run(other, "<b>&")]
    for html in (render_run(runs[0]), render_comparison(runs)):
        page = Reader(html)
        assert len(page.texts("script")) == 1
        assert not {"img", "a", "iframe", "b onmouseover"} & {tag for tag, _ in page.elements}
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert HOSTILE in page.text


def test_it_needs_nothing_beside_itself_and_runs_one_script_only(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b"))]
    for html in (render_run(runs[0]), render_comparison(runs)):
        assert not [reference for reference in REFERENCES if reference in html]
        page = Reader(html)
        (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv")]
        digest = base64.b64encode(hashlib.sha256(page.texts("script")[0].encode()).digest()).decode()
        assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        assert "prefers-color-scheme: dark" in html


def test_a_page_is_small_however_long_the_run_was_and_is_made_of_whatever_there_is(make_run):
    assert len(render_run(read_run(make_run(steps=20_000)))) < 400_000
    bare = make_run("bare", manifest=False)
    (bare / "metrics.csv").write_text("step,train_loss\n")
    assert write_run_page(bare).read_text().startswith("<!doctype html>")
    assert Reader(render_run(read_run(bare))).texts("h2") == ["In short", "What was trained on what", "To do it again"]


def test_settings_are_flattened_and_written_as_yaml_in_one_line():
    config = {"model": {"rank": 8, "lora_options": {}}, "data": {"train": ["a", "b"]}, "seed_everything": 1}
    assert flatten(config) == {
        **{"model.rank": 8, "model.lora_options": {}, "data.train": ["a", "b"], "seed_everything": 1}
    }
    assert [write_setting(value) for value in (None, True, "a: b", ["x", {"path": "y"}], 1e-3)] == [
        *["null", "true", "'a: b'", "[x, {path: y}]", "0.001"]
    ]
