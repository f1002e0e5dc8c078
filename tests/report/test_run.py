import fcntl
import os

import pytest

from qlora_lightning.report.run import name_runs, read_run
from qlora_lightning.support.errors import UserError


def test_a_folder_is_read_whole(make_run):
    folder = make_run()
    (folder / "plan.json").write_text('{"predicted": {"peak_bytes": 5}}')
    (folder / "evaluation.json").write_text('{"rows": 7}')
    run = read_run(folder)
    assert (run.name, run.status) == ("a", "finished")
    assert run.config["model"]["rank"] == 8
    assert run.metrics["val_loss"] == [(10, 1.5 - 9 / 20), (20, 1.5 - 19 / 20)]
    assert run.plan["predicted"] == {"peak_bytes": 5}
    assert run.evaluation == {"rows": 7}


def test_a_run_of_an_earlier_version_is_read_without_a_manifest(make_run):
    run = read_run(make_run(manifest=False))
    assert run.status == "unknown"
    assert run.config["data"]["train"] == "rows.jsonl"


@pytest.mark.parametrize("manifest", [True, False])
def test_a_locked_folder_is_of_a_run_that_goes_on(make_run, manifest):
    folder = make_run(manifest=manifest, status="running")
    assert read_run(folder).status == ("killed" if manifest else "unknown")
    (folder / "checkpoints").mkdir()
    descriptor = os.open(folder / "checkpoints", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert read_run(folder).status == "running"
    finally:
        os.close(descriptor)
    assert read_run(folder).status == ("killed" if manifest else "unknown")


def test_reading_takes_no_lock_that_a_run_would_miss(make_run):
    folder = make_run(status="running")
    (folder / "checkpoints").mkdir()
    read_run(folder)
    descriptor = os.open(folder / "checkpoints", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_what_is_no_run_is_refused_in_a_sentence(make_run, tmp_path):
    folder = make_run()
    (tmp_path / "empty").mkdir()
    for wrong, words in (
        (tmp_path / "missing", "There is no folder"),
        (tmp_path / "empty", "holds no run: expected manifest.json or metrics.csv"),
        (folder / "config.yaml", f"is a file: name the run folder itself, such as {folder}"),
        (folder.parent, rf"Runs lie in it: {folder}\."),
    ):
        with pytest.raises(UserError, match=words):
            read_run(wrong)


@pytest.mark.parametrize("name", ["manifest.json", "evaluation.json", "plan.json", "config.yaml"])
def test_a_damaged_file_is_named(make_run, name):
    folder = make_run(manifest=False)
    (folder / name).write_text("{ [")
    with pytest.raises(UserError, match=name):
        read_run(folder)


def test_marks_that_editors_put_before_a_file_are_passed_over(make_run):
    folder = make_run()
    for name in ("manifest.json", "metrics.csv", "config.yaml", "evaluation.json"):
        file = folder / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    run = read_run(folder)
    assert run.status == "finished"
    assert run.metrics["train_loss"]
    assert run.evaluation["rows"] == 1


def test_runs_are_named_by_the_shortest_end_of_their_paths(tmp_path):
    one, two, three = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"
    assert name_runs([two, three]) == ["run", "other"]
    assert name_runs([one, two]) == ["x/run", "y/run"]
    assert name_runs([one]) == ["run"]
