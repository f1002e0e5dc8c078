import pytest

from qlora_lightning.commands import input_files
from qlora_lightning.commands.input_files import find_inputs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    return tmp_path


def test_what_is_read_are_the_files_named_by_words_by_configs_and_those_of_an_adapter(folder):
    run = folder / "runs/a[1]"
    (run / "adapter").mkdir(parents=True)
    for name in ("adapter/adapter_config.json", "metrics.csv", "val-1.jsonl"):
        (run / name).write_text("{}")
    (run / "config.yaml").write_text("data: {train: [{path: file}], val: 'runs/*/val-*.jsonl', none: [1, null]}")
    expected = {run / "adapter/adapter_config.json", run / "config.yaml", folder / "file", run / "val-1.jsonl"}
    for words in (["runs/a[1]"], ["x=runs/a[1]/adapter"], ["--adapter", "runs/a[1]/adapter", "--data.system", "?*["]):
        assert {each.absolute() for each in find_inputs(words)} == expected
    assert {each.absolute() for each in find_inputs(["--config", "runs/a[1]/config.yaml"])} == {
        run / "config.yaml",
        folder / "file",
        run / "val-1.jsonl",
    }
    assert find_inputs(["nothing", "", "a=", None, "x" * 10_000, "a\0b"]) == []


def test_of_a_folder_of_rows_it_is_all_that_the_reader_would_read(folder):
    for name in ("rows/a.jsonl", "rows/deep/er/b.json.gz", "rows/deep/notes.txt", "rows/.hidden/c.csv", "rows/notes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "config.yaml").write_text("data: {train: [{path: rows, weight: 1}]}")
    (folder / "data.yaml").write_text("train: rows")
    (folder / "config.json").write_text('{"data": {"train": "rows/**/*.gz"}}')
    (folder / "whole").write_text("data: data.yaml")
    rows = {"rows/a.jsonl", "rows/deep/er/b.json.gz"}
    for words, expected in (
        (["--data.train=rows"], {*rows, "rows/notes"}),
        (["--data.train", "rows"], {*rows, "rows/notes"}),
        (
            ["--data.train", "[rows/deep, {path: file, weight: 2}]"],
            {"rows/deep/er/b.json.gz", "rows/deep/notes.txt", "file"},
        ),
        (["--data={train: {path: rows}}"], {*rows, "rows/notes"}),
        (["--config", "config.yaml"], {*rows, "rows/notes", "config.yaml"}),
        (["--config", "config.json"], {"config.json", "rows/deep/er/b.json.gz"}),
        (["-c", "whole"], {*rows, "rows/notes", "data.yaml", "whole"}),
        (["--config", '{"data": {"val": "rows/deep/er"}}'], {"rows/deep/er/b.json.gz"}),
        (["--model.base", "rows"], {"rows/a.jsonl", "rows/notes"}),
    ):
        assert {str(each) for each in find_inputs(words)} == expected, words


def test_folders_of_the_trainer_are_written_into_and_may_hold_what_a_command_wrote_before(folder):
    (folder / "run").mkdir()
    (folder / "run/lr.json").write_text("{}")
    (folder / "config.yaml").write_text("trainer: {default_root_dir: run, logger: {save_dir: run}, profiler: file}")
    words = ["--trainer.default_root_dir=run", "--trainer.default_root_dir", "run", "--config", "config.yaml"]
    assert {str(each) for each in find_inputs(words)} == {"config.yaml", "file"}


def test_a_config_whose_parts_hold_themselves_and_each_other_is_read_in_a_moment(folder):
    lines = ["a: &a [*a, file]", "l0: &l0 [file]", *(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]" for n in range(1, 60))]
    (folder / "config.yaml").write_text("\n".join(lines))
    assert {str(each) for each in find_inputs(["config.yaml"])} == {"config.yaml", "file"}


def test_runs_that_name_themselves_and_each_other_are_parsed_once_each(folder, monkeypatch):
    for run, other in (("a", "b"), ("b", "a")):
        (folder / run / "adapter").mkdir(parents=True)
        (folder / run / "adapter/adapter_config.json").write_text("{}")
        (folder / run / "config.yaml").write_text(
            f"trainer: {{root: {run}, logger: {run}}}\nmodel: {{adapter: {other}}}"
        )
    parsed, parse = [], input_files._parse
    monkeypatch.setattr(input_files, "_parse", lambda *args: (parsed.append(args), parse(*args))[1])
    found = {str(each.absolute().relative_to(folder)) for each in find_inputs(["a/config.yaml", "b/adapter", "a"])}
    assert found == {"a/config.yaml", "b/config.yaml", "a/adapter/adapter_config.json", "b/adapter/adapter_config.json"}
    assert len(parsed) == 2
