"""Folders with a config, its data and finished runs of it: one that each test gets a copy of, one to evaluate in."""

import contextlib
import io
import json
import logging
import shlex
import shutil

import pytest
import torch
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands import fit  # noqa: F401  # here: Lightning keeps the stderr of its first import
from tests.adapters import make_adapter
from tests.random_base import save_random_llama, save_tokenizer
from tests.rows import write_rows

CONFIG = yaml.safe_load("""
seed_everything: 3
model: {base: tiny, rank: 2, dropout: 0.1, learning_rate: 0.01, schedule: constant, warmup: 0.0}
data: {train: rows.jsonl, val: rows.jsonl, test: rows.jsonl, predict: questions.jsonl, batch_size: 2, max_new_tokens: 2}
evaluation: {max_new_tokens: 2}   # answers of a random base would run on until they are cut
trainer:
  {accelerator: cpu, devices: 1, accumulate_grad_batches: 2, limit_val_batches: 1, limit_train_batches: 5,
  enable_progress_bar: false, default_root_dir: run}
""")

EVALUATED_CONFIG = """
seed_everything: 3
model: {base: tiny, rank: 2, compute_dtype: fp32, learning_rate: 0.03, warmup: 0.0}
data: {train: rows.jsonl, val: [rows.jsonl, events.jsonl], batch_size: 4}
evaluation: {rows: 3, max_new_tokens: 3, scores: [chrf, exact_match], samples: 2}
trainer:
  {accelerator: cpu, max_steps: 4, limit_val_batches: 2, enable_progress_bar: false, default_root_dir: runs/quickstart}
"""
NOTED = ("lunch", "dinner", "dance", "lecture")
EVENTS = [{"instruction": f"Note {word}.", "output": json.dumps({"what": word})} for word in NOTED]


def help_examples(command):
    """The arguments of each example that the help of a command shows, to run it as it is."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    lines = [line.strip() for line in out.getvalue().splitlines()]
    found = [shlex.split(line)[1:] for line in lines if line.startswith(f"qlora-lightning {command} --")]
    assert found
    return found


def run_command(*arguments):
    """Run a command; return its exit code, what it printed and its error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def read_predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def bare_folder(tiny_base, tmp_path_factory):
    """The current folder, with a base without weights."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(tiny_base, folder / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "1")
        yield folder


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """A random LLaMA with a small tokenizer: transformers reads a large one from a GGUF file in 15 seconds."""
    save_tokenizer(folder := tmp_path_factory.mktemp("small"), ["Count to 1 2 3 4."], size=512)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512, "tie_word_embeddings": True}
    save_random_llama(folder, torch.float32, **sizes)
    return folder


@pytest.fixture(scope="session")
def finished(tiny_base, tmp_path_factory):
    """c.yaml and its data, the three steps of its `fit` in `run`, and those of two epochs in `whole`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny").symlink_to(tiny_base)
    rows = [{"instruction": f"Count to {n}." + " Please." * (n % 4), "output": "1 2 3 4"[:n]} for n in range(1, 17)]
    write_rows(folder / "rows.jsonl", rows)
    questions = [{"instruction": "Say one.", "output": "one"}, {"instruction": "Say two."}]
    write_rows(folder / "questions.jsonl", questions)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "1")
        assert main(["fit", "--config", "c.yaml"]) == 0
        whole = ["--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole", "--evaluation", "null"]
        assert main(["fit", "--config", "c.yaml", *whole]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A folder with a run, two more adapters on its base, and rows; what is evaluated in it names its own files."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 9)]
    for name, content in {"rows": rows, "events": EVENTS, "more": rows[:3]}.items():
        write_rows(folder / f"{name}.jsonl", content)
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(EVALUATED_CONFIG)
    (folder / "tiny").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "configs/quickstart.yaml"]) == 0
        make_adapter(folder / "runs/b/adapter", "tiny", target_modules="attention", std=0.5)
    shutil.copytree(folder / "runs/quickstart/adapter", folder / "runs/a/adapter")
    shutil.copy(folder / "runs/quickstart/config.yaml", folder / "runs/b")
    return folder


@pytest.fixture
def command(finished, tmp_path, monkeypatch, capsys, caplog):
    """Run a command in a copy of the finished folder; return what it printed and logged."""
    shutil.copytree(finished, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "300")

    def run(name, *arguments, config="c.yaml", code=0):
        capsys.readouterr()
        caplog.clear()
        assert main([name, "--config", str(config), *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err + caplog.text

    yield run
    logging.getLogger("qlora_lightning").handlers.clear()


@pytest.fixture
def write_config(tmp_path):
    """Write c.yaml with other settings into other.yaml, and return its name."""

    def write(**sections):
        config = dict(CONFIG)
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
        return "other.yaml"

    return write
