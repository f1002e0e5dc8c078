"""Any run folder is read: whole, half, still training, of version 0.1; a damaged one is refused by name."""

import fcntl
import json
import math
import os

import pytest

from qlora_lightning.report.page import render_run
from qlora_lightning.report.run import name_runs, read_manifest, read_metrics, read_run, write_manifest
from qlora_lightning.support.errors import UserError


def test_a_folder_is_read_whole_also_as_editors_and_spreadsheets_save_it(make_run):
    folder = make_run()
    (folder / "plan.json").write_text('{"predicted": {"peak_bytes": 5}}')
    for name in ("manifest.json", "metrics.csv", "config.yaml", "evaluation.json", "plan.json"):
        file = folder / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    run = read_run(folder)
    assert (run.name, run.status, run.config["model"]["rank"]) == ("a", "finished", 8)
    assert run.metrics["val_loss"] == [(10, 1.5 - 9 / 20), (20, 1.5 - 19 / 20)]
    assert run.plan["predicted"] == {"peak_bytes": 5}
    assert run.evaluation["rows"] == 1


@pytest.mark.parametrize("manifest", [True, False])
def test_a_locked_folder_is_of_a_run_that_is_training(make_run, manifest):
    folder = make_run(manifest=manifest, status="running")
    (folder / "checkpoints").mkdir()
    ended = "killed" if manifest else "unknown"
    assert read_run(folder).status == ended
    assert read_run(folder).config["data"]["train"] == "rows.jsonl"
    descriptor = os.open(folder / "checkpoints", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # reading left no lock behind
        assert read_run(folder).status == "running"
    finally:
        os.close(descriptor)
    assert read_run(folder).status == ended


def test_what_is_no_run_is_refused(make_run, tmp_path):
    folder = make_run()
    (tmp_path / "empty").mkdir()
    for wrong, words in (
        (tmp_path / "missing", "There is no folder"),
        (folder / "config.yaml", "There is no folder"),
        (tmp_path / "empty", "holds no run: expected manifest.json or metrics.csv"),
        (folder.parent, rf"These folders in it do: {folder}\."),
    ):
        with pytest.raises(UserError, match=words):
            read_run(wrong)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[(name, "{ [") for name in ("manifest.json", "evaluation.json", "plan.json", "config.yaml")],
        *[("plan.json", 100_000 * "["), ("evaluation.json", "[]")],
        *[("evaluation.json", '{"metrics": {"loss": {"base": {"value": "1x"}}}}')],
        *[("evaluation.json", '{"samples": ["x"]}'), ("plan.json", '{"predicted": {"peak_bytes": "5"}}')],
        *[("manifest.json", "{}"), ("manifest.json", '{"format": "qlora_lightning manifest", "format_version": 2}')],
        *[("metrics.csv", "a,b\n1,2\n"), ("metrics.csv", "a\n\xff")],
    ],
)
def test_a_damaged_file_is_named(make_run, name, content):
    folder = make_run()
    (folder / name).write_text(content, encoding="latin-1")
    if name == "config.yaml":
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=name):
        render_run(read_run(folder))


@pytest.mark.parametrize(
    "changes",
    [
        *[{"progress": {"steps": "20"}}, {"device": {"name": "A CPU"}}, {"data": {"splits": {"train": None}}}],
        *[{"warnings": [{"text": "slow"}]}, {"best": {"monitor": "val_loss", "value": "x", "checkpoint": "c"}}],
    ],
)
def test_a_manifest_of_another_form_is_damaged(make_run, changes):
    with pytest.raises(UserError, match=r"is damaged .*manifest\.json.*Move it away"):
        render_run(read_run(make_run(**changes)))


def test_runs_are_named_by_the_shortest_end_of_their_paths(tmp_path):
    one, two, three = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"
    assert name_runs([two, three]) == ["run", "other"]
    assert name_runs([one, two]) == ["x/run", "y/run"]
    assert name_runs([one]) == ["run"]


def test_a_manifest_is_json_that_every_reader_takes(tmp_path):
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, {"loss": math.nan, "deep": [{"norm": -math.inf}], "name": "Grüße"})
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]
    assert json.loads((tmp_path / "manifest.json").read_text()) == read_manifest(tmp_path)
    assert read_manifest(tmp_path) == {
        **{"format": "qlora_lightning manifest", "format_version": 1},
        **{"loss": None, "deep": [{"norm": None}], "name": "Grüße"},
    }


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        ("step,train_loss,val_loss\n0,2.5,\n1,,1.5\n", {"train_loss": [(1, 2.5)], "val_loss": [(2, 1.5)]}),
        ("step,loss\n0,1.0\n1,nan\n2,inf\n3,x\n4\n5,2.0\n6,1e308\n7,0.12", {"loss": [(1, 1.0), (6, 2.0)]}),
        ("step,lo", {}),
        ("", {}),
    ],
)
def test_half_a_line_and_what_is_no_number_are_left_out_of_metrics(tmp_path, lines, columns):
    file = tmp_path / "metrics.csv"
    assert read_metrics(file) == {}
    file.write_text(lines)
    assert read_metrics(file) == columns
