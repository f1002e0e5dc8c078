"""The command as a user runs it, on real files with SmolLM2's tokenizer."""

import json
import subprocess
import sys

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands import training
from qlora_lightning.commands.epoch import DEFAULT_EPOCHS
from qlora_lightning.commands.inspection.arguments import make_data_module, parse

CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "rank": 2},
    "data": {"train": "train.jsonl", "val": "val.jsonl", "batch_size": 4},
    "gpu_memory": None,
    "trainer": {"devices": 1, "max_epochs": 2, "accumulate_grad_batches": 2},
}
MINE = """
from qlora_lightning import InstructionDataModule

class Mine(InstructionDataModule):
    def __init__(self, count: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.count = count
"""


def _write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" if isinstance(row, dict) else row + "\n" for row in rows))


@pytest.fixture
def folder(tiny_base, tmp_path, monkeypatch):
    """A folder with c.yaml, ten training rows and three to validate on, one of which is a training row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    (tmp_path / "tiny").symlink_to(tiny_base)
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n + 1)))} for n in range(10)]
    _write(tmp_path / "train.jsonl", rows)
    _write(
        tmp_path / "val.jsonl",
        [rows[4], {"instruction": "Say é🦙.", "output": "é🦙"}, {"instruction": "a", "output": "b"}],
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["inspect", "--config", "c.yaml", *arguments]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out, captured.err

    return run


def _line(text, heading):
    return next(line.split()[len(heading.split()) :] for line in text.splitlines() if line.startswith(heading))


def test_the_report_of_a_config(run):
    out, err = run()
    assert err == ""
    assert _line(out, "shapes found") == ["alpaca", "alpaca"]
    assert _line(out, "rows read") == ["10", "3"]
    assert _line(out, "also in train") == ["1"]
    assert "val: 1 row also in train, so val_loss is too good\n  val.jsonl:1 = train.jsonl:5\n" in out
    assert "2 per epoch, a step every 2; 4 in all (2 epochs)" in out
    assert "✓ Stop token <|im_end|> (2): every sample trains one." in out
    assert "│Count│ to│ │0│.│<|im_end|>│↵" in out.replace("\n  ", "")
    assert "⟦0│<|im_end|>■⟧↵" in out
    assert "train.jsonl:2  " in out
    assert "train.jsonl:3  " not in out
    assert max(map(len, out.splitlines())) <= 80


def test_rows_as_they_are_asked_for(run):
    out, _ = run("--split", "val", "--row", "2", "--longest", "--search", "É🦙")
    assert "é│🦙│<|im_end|>■⟧" in out.replace("\n  ", "")
    assert "val.jsonl:1  " in out
    assert "1 of 3 samples hold it." in out
    assert "An epoch of train" not in out


def test_each_source_is_counted_and_so_are_weights_and_duplicates(run, folder):
    rows = [{"question": f"{n}?", "answer": str(n), "weight": 1 + n % 2} for n in range(4)]
    _write(folder / "more.jsonl", [*rows, rows[0]])
    _write(folder / "texts.jsonl", [{"text": "A long story. " * 40}])
    sources = [{"path": "more.jsonl", "weight": 3}, {"path": "texts.jsonl", "weight": 1, "format": "text"}]
    data = {"train": sources, "max_length": 64, "deduplicate": True}
    (folder / "c.yaml").write_text(yaml.safe_dump({"model": {"base": "tiny"}, "data": data}))
    out, _ = run("--row", "more.jsonl:2", "--html", "page.html")
    assert out.endswith("\nPage: page.html\n")
    assert _line(out, "more.jsonl ")[:2] == ["4", "4"]
    assert _line(out, "more.jsonl ")[-1] == "75.0%"
    assert _line(out, "texts.jsonl ")[:2] == ["1", "3"]
    assert _line(out, "with a weight") == ["2"]
    assert "1: equal to an earlier row (deduplicate: true)" in out
    assert "deduplicate True" in " ".join(out.split())
    assert "labelled, weight 2" in out
    assert "✗" not in out
    assert "<td>75.0%</td>" in (folder / "page.html").read_text(encoding="utf-8")


def test_settings_on_the_command_line_count(run):
    out, _ = run("--data.max_length", "45", "--trainer.devices", "2", "--data.batch_size", "1")
    assert "max_length 45" in out
    assert "5 of 1 row on each of 2 devices" in out
    assert int(_line(out, "samples shortened")[0]) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--html c.yaml", "--html c.yaml: expected a file name that ends in .html."),
        ("--html no/page.html", "--html no/page.html: the folder no does not exist"),
        ("--html folder.html", "--html folder.html is a folder"),
        ("--split test", "there are no rows to inspect: data.test names no file."),
        ("--split vl", "argument --split: invalid choice: 'vl'"),
        ("--row 99", "--row 99: train has no such row; its 10 rows end at 10."),
        ("--row", "argument --row: expected one argument. See `qlora-lightning inspect --help`."),
        ("stray", "unrecognized arguments: stray. See `qlora-lightning inspect --help`."),
        ("--data.batchsize 3", "There is no key 'data.batchsize'. Did you mean data.batch_size? (on the command line)"),
        ("--data.max_length q", "data.max_length: Expected a <class 'int'>. Got value: q."),
        ("--spilt val", "There is no key 'spilt'. Did you mean split? (on the command line)"),
        ("--modle.base x", "There is no key 'modle'. Did you mean model? (on the command line)"),
        ("--config no.yaml", "--config no.yaml: no such file"),
        ("--config wrong.yaml", "There is no key 'gpu_memroy'. Did you mean gpu_memory? (in "),
        ("--config cut.yaml", "cut.yaml is not YAML: "),
        ("--data nowhere.Mine", "No module named 'nowhere'"),
        ("--model.base null", "model.base is missing: the data are rendered with its tokenizer."),
        ("--data.val_fraction 0.5", "val and val_fraction are both given"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(run, folder, arguments, sentence):
    (folder / "wrong.yaml").write_text("data: {}\ngpu_memroy: {}\n")
    (folder / "cut.yaml").write_text("data: {train: a.jsonl\n")
    (folder / "folder.html").mkdir()
    out, err = run(*arguments.split(), code=2)
    assert out == ""
    assert err.startswith("qlora-lightning: ")
    assert sentence in err


@pytest.mark.parametrize(
    ("arguments", "tokenizer"),
    [
        ("--model.revision v2", {"name": "tiny", "revision": "v2", "trust_remote_code": False}),
        ("--model.trust_remote_code true", {"name": "tiny", "revision": None, "trust_remote_code": True}),
        ("--model.trust_remote_code FALSE --model.revision null", "tiny"),
        ("--data.tokenizer mine", "mine"),
        ("--model.base other", "other"),
    ],
)
def test_the_tokenizer_is_the_base_s_of_the_same_revision_unless_it_is_named(folder, arguments, tokenizer):
    _, config = parse(["--config", "c.yaml", *arguments.split()])
    make_data_module(config)
    assert config.data.init_args.tokenizer == tokenizer


def test_a_data_module_of_ones_own_is_made_with_its_arguments(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "mine.py").write_text(MINE)
    for data in ("{class_path: mine.Mine, count: 5}", "{class_path: mine.Mine, init_args: {count: 5}}"):
        (folder / "c.yaml").write_text(f"model: {{base: tiny}}\ndata: {data}\n")
        made = make_data_module(parse(["--config", "c.yaml", "--data.max_length", "77"])[1])
        assert (type(made).__name__, made.count, made.max_length) == ("Mine", 5, 77)


def test_the_default_of_epochs_is_that_of_fit():
    assert training.TRAINER_DEFAULTS["max_epochs"] == DEFAULT_EPOCHS


def test_bad_rows_are_listed_and_the_rest_is_shown(run, folder):
    rows = (folder / "train.jsonl").read_text().splitlines()
    _write(folder / "train.jsonl", [rows[0], "{not JSON", *rows[1:]])
    out, err = run("--row", "2", "--row", "3", code=2)
    assert _line(out, "bad rows") == ["1", "0"]
    assert "train: 1 bad row\n  train.jsonl:2: " in out
    assert "train.jsonl:2  a bad row: " in out
    assert "⟦0│ │1│<|im_end|>■⟧" in out
    assert err.startswith("qlora-lightning: there are bad rows (1 in train), listed above: `fit` stops at them.")
    out, err = run("--data.on_bad_row", "skip")
    assert err == ""
    assert "train: 1 bad row\n" in out


def test_rows_to_predict_are_shown_as_generation_begins(run, folder):
    _write(folder / "questions.jsonl", [{"instruction": "Who?"}, {"instruction": "Why?", "output": "So."}])
    out, _ = run("--data.predict", "questions.jsonl", "--split", "predict", "--row", "2")
    assert _line(out, "rows read") == ["2"]
    assert "│<|im_start|>│ass│istant│↵" in out.replace("\n  ", "")
    assert "So" not in out.partition("Rows of predict")[2]
    assert "Stop token" not in out


def test_a_stream_is_judged_by_its_first_rows(run, folder):
    rows = [{"instruction": "Say it.", "output": str(n)} for n in range(1_500)]
    _write(folder / "train.jsonl", [*rows, "{not JSON"])
    out, _ = run("--data.streaming", "true", "--trainer.max_steps", "9", "--split", "train")
    assert "Streaming: of train only the first 1,000 rows were read" in " ".join(out.split())
    assert _line(out, "rows read") == ["1,000"]
    assert "9 in all (max_steps)" in out


def test_the_config_of_a_run_folder_will_do(run, folder, capsys):
    assert main(["fit", "--config", "c.yaml", "--trainer.default_root_dir", "run", "--trainer.accelerator", "cpu",
                 "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]) == 0  # fmt: skip
    out, _ = run("--config", "run/config.yaml")
    assert "1 in all (max_steps)" in out


def test_no_model_is_loaded(folder):
    code = """
import sys
from qlora_lightning.cli import main
assert main(["inspect", "--config", "c.yaml", "--html", "page.html"]) == 0
heavy = {"peft", "bitsandbytes", "datasets", "transformers.modeling_utils", "qlora_lightning.model"}
print("heavy:", heavy & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: set()\n")


def test_merge_keys_bring_in_what_is_beside_them_again(run, folder):
    _write(folder / "val.jsonl", [{"instruction": "Say it.", "output": "it"}])
    (folder / "c.yaml").write_text(
        "model: {base: tiny}\ndata:\n  train: &source {path: train.jsonl}\n  val: {<<: *source, path: val.jsonl}\n"
    )
    out, _ = run()
    assert _line(out, "rows read") == ["10", "1"]


def test_a_text_on_the_command_line_may_look_like_yaml_in_which_a_key_stands_twice(run):
    out, _ = run("--data.system", "a: 1\na: 2", "--row", "1")
    assert "a│:│ │1│↵" in out
    assert "a│:│ │2" in out
