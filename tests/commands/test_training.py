import contextlib
import csv
import json
import logging
import os
import pty
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qlora_lightning.cli import main
from qlora_lightning.commands import training  # here, and not inside a test, whose stderr Lightning would keep
from qlora_lightning.model import generate
from qlora_lightning.support.errors import UserError

CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "rank": 2, "dropout": 0.1, "learning_rate": 0.01, "schedule": "constant"},
    "data": {"train": "rows.jsonl", "val": "rows.jsonl", "test": "rows.jsonl", "predict": "questions.jsonl"},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "accumulate_grad_batches": 2,
        "limit_val_batches": 1,
        "limit_train_batches": 5,
        "enable_progress_bar": False,
        "default_root_dir": "run",
    },
}
CONFIG["model"]["warmup_ratio"] = 0.0
CONFIG["data"]["batch_size"] = 2
MODULE = """
import os
import time
import lightning
from qlora_lightning import InstructionDataModule, QLoRAModule


class Mine(QLoRAModule):
    def __init__(self, loud: int = 1, **kwargs):
        super().__init__(**kwargs)
        print(f"loud is {loud}")


class MyRows(InstructionDataModule):
    def __init__(self, count: int, **kwargs):
        super().__init__(**kwargs)
        self.count = count

    def load_rows(self, split):
        return [{"instruction": "Say it.", "output": "it"}] * self.count if split == "train" else []


class Interrupt(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            raise KeyboardInterrupt


class Ask(lightning.Callback):
    def __init__(self, signal: int):
        self.signal = signal

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), self.signal)


class Hangup(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            print("CLOSE ME", flush=True)
            while os.isatty(1):
                time.sleep(0.01)
"""
IN_TERMINAL = """
import os, sys
from qlora_lightning.cli import main

os.open(os.ttyname(0), os.O_RDWR)  # the first that a new session opens is its terminal
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def run(tiny_base, rows_file, tmp_path, monkeypatch, capsys, caplog):
    """Run a command in a folder with c.yaml and its data; gives what it printed and logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("COLUMNS", "300")
    plain = generate._generate  # answers of a random base run on until they are cut: two tokens will do
    monkeypatch.setattr(generate, "_generate", lambda *arguments: plain(*arguments[:-1], 2))
    (tmp_path / "tiny").symlink_to(tiny_base)
    (tmp_path / "researcher.py").write_text(MODULE)
    rows = [{"instruction": "Say one.", "output": "one"}, {"instruction": "Say two."}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))

    def call(command, *arguments, config="c.yaml", code=0):
        capsys.readouterr()
        caplog.clear()
        assert main([command, "--config", str(config), *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err + caplog.text

    yield call
    logging.getLogger("qlora_lightning").handlers.clear()


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def write_config(folder, **sections):
    config = {name: dict(section) if isinstance(section, dict) else section for name, section in CONFIG.items()}
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    (folder / "other.yaml").write_text(yaml.safe_dump(config))
    return "other.yaml"


def test_fit_fills_the_run_folder_and_its_config_gives_the_same_adapter_again(run, tmp_path):
    out = run("fit")
    assert {"config.yaml", "metrics.csv", "checkpoints", "adapter"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }
    assert "Validation rows, base → adapter" in out
    assert "Memory after loading" in out
    rows = [row for row in metrics(tmp_path / "run") if row["train_loss"]]
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["rank"] == 2
    assert "class_path" not in config["model"]
    assert config["trainer"]["gradient_clip_val"] == 1.0
    run("fit", "--trainer.default_root_dir", "again", config="run/config.yaml")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "run")
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    again["trainer"]["default_root_dir"] = "run"
    assert again == config


def test_a_run_folder_in_the_home_folder_is_one_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run("fit", "--trainer.default_root_dir", "~/mine", "--trainer.max_steps", 1)
    run("fit", "--trainer.default_root_dir", "~/mine", "--trainer.max_steps", 2, "--ckpt_path", "last")
    assert {row["step"] for row in metrics(tmp_path / "home" / "mine") if row["train_loss"]} == {"0", "1"}
    assert not (tmp_path / "~").exists()
    run("validate", config="home/mine/config.yaml")


def test_the_run_folders_config_serves_validate_test_and_predict(run, tmp_path):
    run("fit")
    logged = [float(row["val_loss"]) for row in metrics(tmp_path / "run") if row["val_loss"]][-1]
    config = tmp_path / "run" / "config.yaml"
    out = run("validate", config=config)
    assert "Adapter: run/adapter" in out
    assert f"{logged:.4f}"[:6] in out
    out = run("test", config=config)
    assert "Adapter: run/adapter" in out
    assert all(name in out for name in ("test_loss", "test_perplexity", "test_token_accuracy"))
    out = run("predict", config=config)
    assert "2 predictions: run/predictions.jsonl" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reference"]) for line in lines] == [(0, "one"), (1, None)]
    assert all(isinstance(line["prediction"], str) for line in lines)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_judging_leaves_the_files_of_the_run_as_they_are(run, tmp_path, command):
    run("fit")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    run(command)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_base_can_be_judged_before_the_first_fit(run, command):
    assert "this judges the base alone" in run(command)
    run("fit")


def test_the_checkpoint_and_the_adapter_folder_are_judged_alike(run, tmp_path):
    run("fit")
    folder = run("validate")
    checkpoint = run("validate", "--ckpt_path", "last")
    assert "Adapter:" not in checkpoint
    base = run("validate", "--trainer.default_root_dir", "elsewhere")
    assert "this judges the base alone" in base

    def loss(text):
        return next(line.split("│")[2] for line in text.splitlines() if "val_loss" in line)

    assert loss(folder) == loss(checkpoint) != loss(base)


def test_a_started_folder_is_refused_with_the_two_ways_out(run, tmp_path):
    run("fit")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    out = run("fit", code=2)
    assert "run holds a run already" in out
    assert "--ckpt_path last" in out
    assert "--trainer.default_root_dir runs/NAME" in out
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_ckpt_path_last_starts_fresh_and_then_goes_on_to_the_same_end(run, tmp_path):
    run("fit", "--trainer.max_epochs", 2, "--trainer.default_root_dir", "whole")
    run("fit", "--ckpt_path", "last")
    out = run("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert "Restored all states from the checkpoint" in out
    whole, cut = (torch.load(tmp_path / f / "checkpoints" / "last.ckpt", weights_only=True) for f in ("whole", "run"))
    assert whole["global_step"] == cut["global_step"] == 6
    assert all(torch.equal(cut["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    columns = ("step", "train_loss", "val_loss", "tokens_seen")
    assert [[row[c] for c in columns] for row in metrics(tmp_path / "run")] == [
        [row[c] for c in columns] for row in metrics(tmp_path / "whole")
    ]


def test_other_rows_go_on_where_that_is_said_and_the_runs_config_does_not_say_it_again(run, tmp_path):
    run("fit")
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join([*rows[1:], rows[0]]))
    more = ("--ckpt_path", "last", "--trainer.max_epochs", 2)
    out = run("fit", *more, config="run/config.yaml", code=2)
    assert "other training samples (16 there and here" in out
    assert "other validation samples" in out
    assert "--data.accept_changed_data true" in out
    run("fit", *more, "--data.accept_changed_data", "true", config="run/config.yaml")
    assert "accept_changed_data" not in (tmp_path / "run" / "config.yaml").read_text()
    assert len([row for row in metrics(tmp_path / "run") if row["train_loss"]]) == 6
    run("validate", "--ckpt_path", "last", "--data.val", "questions.jsonl", "--data.on_bad_row", "skip")


def test_an_interrupted_run_goes_on_to_the_same_end(run, tmp_path):
    run("fit", "--trainer.max_epochs", 2, "--trainer.default_root_dir", "whole")
    config = write_config(
        tmp_path,
        trainer={"callbacks": [{"class_path": "researcher.Interrupt"}], "max_epochs": 2},
        adapter_checkpoint={"every_n_train_steps": 1},
    )
    with contextlib.suppress(SystemExit):
        run("fit", config=config, code=130)
    run("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    whole, cut = (load_file(tmp_path / f / "adapter" / "adapter_model.safetensors") for f in ("whole", "run"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_an_interrupted_run_ends_with_code_130(run, tmp_path):
    config = write_config(tmp_path, trainer={"callbacks": [{"class_path": "researcher.Interrupt"}], "max_epochs": 2})
    try:
        assert "interrupted" in run("fit", config=config, code=130)
    except SystemExit as error:
        pytest.fail(f"exit code {error.code}")


def test_a_value_on_the_command_line_beats_the_config_which_beats_the_checkpoint(run, tmp_path):
    run("fit")
    run("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2, "--model.dropout", 0.0)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["dropout"] == 0.0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["qlora_lightning"]["settings"]["dropout"] == 0.0
    assert "hyper_parameters" not in checkpoint


@pytest.mark.parametrize("value", [None, False])
def test_null_and_false_switch_callbacks_off_in_yaml(run, tmp_path, value):
    config = write_config(tmp_path, trainer={"limit_train_batches": 2, "limit_val_batches": 0})
    (tmp_path / config).write_text(
        (tmp_path / config).read_text() + yaml.safe_dump({"gpu_memory": value, "throughput": value})
    )
    assert "Memory after loading" not in run("fit", config=config)
    assert not {"private_memory_gib", "tokens_seen"} & metrics(tmp_path / "run")[0].keys()


@pytest.mark.parametrize("switch", [["--gpu_memory", "null"], ["--gpu_memory=false"]])
def test_null_and_false_switch_callbacks_off_on_the_command_line(run, tmp_path, switch):
    assert "Memory after loading" not in run(
        "fit", *switch, "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 0
    )
    columns = metrics(tmp_path / "run")[0].keys()
    assert "tokens_seen" in columns
    assert "private_memory_gib" not in columns


@pytest.mark.parametrize("nested", [False, True])
def test_a_subclass_is_named_by_class_path_beside_flat_keys_or_with_init_args(run, tmp_path, nested):
    model, data = {"base": "tiny", "loud": 7}, {"count": 4, "batch_size": 2}
    if nested:
        model, data = {"init_args": model}, {"init_args": data}
    config = {
        "model": {"class_path": "researcher.Mine", **model},
        "data": {"class_path": "researcher.MyRows", **data},
        "trainer": CONFIG["trainer"],
    }
    (tmp_path / "sub.yaml").write_text(yaml.safe_dump(config))
    out = run("fit", config="sub.yaml")
    assert "loud is 7" in out
    assert "train: 4 rows" in out
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["model"]["class_path"], saved["model"]["loud"]) == ("researcher.Mine", 7)
    assert (saved["data"]["class_path"], saved["data"]["count"]) == ("researcher.MyRows", 4)
    out = run("fit", "--trainer.default_root_dir", "again", config="run/config.yaml")
    assert "loud is 7" in out


def test_a_trial_run_leaves_a_finished_run_alone(run, tmp_path):
    run("fit")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    run("fit", "--trainer.fast_dev_run", "true")
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(("command", "key"), [("test", "test"), ("predict", "predict"), ("validate", "val")])
def test_rows_that_are_missing_are_asked_for_by_their_key(run, tmp_path, command, key):
    config = write_config(tmp_path, data={key: None})
    out = run(command, config=config, code=2)
    assert "TrainerFn" not in out
    assert f"data.{key}" in out


def test_a_folder_left_by_a_kill_before_the_first_save_starts_fresh_when_asked_for_the_last(run, tmp_path):
    """A requeued job needs one command, whatever the kill left behind."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,train_loss\n0,9.0\n1,8.0\n")
    assert "starts fresh" in run("fit", "--ckpt_path", "last")
    whole = (tmp_path / "run" / "metrics.csv").read_text()
    assert "9.0\n" not in whole
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.accumulate_grad_batches", 0),
        ("trainer.gradient_clip_val", -1),
        ("model.rank", 0),
        ("model.dropout", 1.5),
        ("model.layers", "'first:2'"),
        ("model.learning_rate", -1.0),
        ("model.schedule", "'cosin'"),
        ("model.warmup_ratio", 1.0),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_data_are_read(run, key, value):
    said = run("fit", f"--{key}={str(value).strip(chr(39))}", "--data.train", "none.jsonl", code=2)
    assert f"{key} is {value}: expected" in said


def test_a_run_folder_that_cannot_be_written_is_refused(run):
    said = run("fit", "--trainer.default_root_dir", "/proc/no", code=2)
    assert "trainer.default_root_dir /proc/no cannot be written to" in said


@pytest.mark.filterwarnings("ignore:You passed `Trainer.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains_with_clipping(run, precision):
    run("fit", "--trainer.precision", precision)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_fit_with_its_code_and_one_command_goes_on_to_the_same_end(run, tmp_path, number, code):
    run("fit", "--trainer.default_root_dir", "whole")
    ask = {"class_path": "researcher.Ask", "init_args": {"signal": int(number)}}
    out = run("fit", config=write_config(tmp_path, trainer={"callbacks": [ask]}), code=code)
    assert "Stopped at step 2 in epoch 0, saved in run/checkpoints/last.ckpt. To resume, add `--ckpt_path last`" in out
    run("fit", "--ckpt_path", "last")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    columns = ("step", "train_loss", "val_loss", "tokens_seen")
    assert [[row[c] for c in columns] for row in metrics(tmp_path / "run")] == [
        [row[c] for c in columns] for row in metrics(tmp_path / "whole")
    ]


def test_a_fit_whose_terminal_is_closed_saves_and_one_command_goes_on_to_the_same_end(run, tmp_path):
    run("fit", "--trainer.default_root_dir", "whole")
    callbacks = {"callbacks": [{"class_path": "researcher.Hangup"}], "enable_progress_bar": True}
    config = write_config(tmp_path, trainer=callbacks)
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, "fit", "--config", config]
    process = subprocess.Popen(command, start_new_session=True, stdin=end, stdout=end, stderr=end)
    os.close(end)
    seen = b""
    while b"CLOSE ME" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(timeout=300) == 128 + signal.SIGHUP
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    run("fit", "--ckpt_path", "last")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    columns = ("step", "train_loss", "val_loss", "tokens_seen")
    assert [[row[c] for c in columns] for row in metrics(tmp_path / "run")] == [
        [row[c] for c in columns] for row in metrics(tmp_path / "whole")
    ]


def test_a_broken_last_checkpoint_is_refused_by_name_and_nothing_is_started_over_it(run, tmp_path):
    run("fit")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1000])
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    good = "run/checkpoints/step-000003.ckpt"
    for asked in ("last", "run/checkpoints/last.ckpt"):
        said = run("fit", "--ckpt_path", asked, "--trainer.max_epochs", 2, code=2)
        assert "run/checkpoints/last.ckpt is damaged or not a checkpoint" in said
        assert f"resume from it with `--ckpt_path {good}`" in said
        assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    run("fit", "--ckpt_path", good, "--trainer.max_epochs", 2)
    assert torch.load(last, weights_only=True)["global_step"] == 6


SELDOM_LENGTHENED = [
    ({"max_epochs": 1}, {"max_epochs": 2}, False),
    ({"max_steps": 99, "max_epochs": 1}, {"max_steps": 99, "max_epochs": 2}, True),
    ({"max_steps": 99, "max_epochs": 1}, {"max_steps": 99, "max_epochs": 2}, False),
    ({"max_epochs": -1, "max_steps": 2}, {"max_epochs": -1, "max_steps": 5}, False),
    ({"max_epochs": -1, "max_steps": 3}, {"max_epochs": -1, "max_steps": 5}, True),
]


@pytest.mark.parametrize(
    ("first", "then", "validates"),
    [
        ({"max_epochs": 1}, {"max_epochs": 2}, True),
        ({"max_epochs": -1, "max_steps": 2}, {"max_epochs": -1, "max_steps": 5}, True),  # ends inside the first epoch
        ({"max_epochs": -1, "max_steps": 3}, {"max_epochs": -1, "max_steps": 5}, False),  # ends with it
        *(pytest.param(*lengths, marks=pytest.mark.slow) for lengths in SELDOM_LENGTHENED),
    ],
)
def test_a_longer_run_goes_on_as_if_it_had_been_so_long_from_the_start(run, tmp_path, first, then, validates):
    def options(lengths):
        limit = ["--trainer.limit_val_batches", int(validates)]
        return [*limit, *(text for name, value in lengths.items() for text in (f"--trainer.{name}", value))]

    run("fit", "--trainer.default_root_dir", "whole", *options(then))
    run("fit", *options(first))
    out = run("fit", "--ckpt_path", "last", *options(then))
    name = list(first)[-1]
    assert f"trainer.{name}: {first[name]} → {then[name]}" in out
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    states = [torch.load(tmp_path / f / "checkpoints" / "last.ckpt", weights_only=True) for f in ("whole", "run")]
    assert states[0]["global_step"] == states[1]["global_step"]
    assert all(torch.equal(states[1]["state_dict"][name], value) for name, value in states[0]["state_dict"].items())
    columns = ("step", "train_loss", "val_loss", "tokens_seen")
    whole, longer = (metrics(tmp_path / name) for name in ("whole", "run"))
    assert [[row.get(c) for c in columns] for row in longer] == [[row.get(c) for c in columns] for row in whole]


def test_a_longer_run_takes_the_learning_rate_of_the_new_plan(run, tmp_path):
    run("fit", "--model.schedule", "linear")
    run("fit", "--model.schedule", "linear", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    rates = {row["step"]: float(row["learning_rate"]) for row in metrics(tmp_path / "run") if row["learning_rate"]}
    assert rates["3"] == pytest.approx(0.005)  # by the old plan 0


def test_a_job_that_slurm_requeued_goes_on_by_itself(run, tmp_path, monkeypatch):
    run("fit")
    monkeypatch.setattr("qlora_lightning.commands.training.was_requeued", lambda: True)
    assert "Restored all states" in run("fit", "--trainer.max_epochs", 2)


def test_a_parser_is_made_for_the_command_that_runs_and_no_other():
    class Cli(training.QLoRACLI):
        def parse_arguments(self, parser, args):
            made.extend(self.subcommands())
            raise UserError("that is enough")

    made = []
    with pytest.raises(UserError, match="that is enough"):
        training.main(["validate"], Cli)
    assert made == ["validate"]


def test_a_run_with_few_steps_or_none_is_told(run):
    settings = ["--evaluation=null"]
    out = run("fit", *settings)
    assert "Nothing" not in out
    out = run("fit", *settings, "--ckpt_path", "last")
    assert "Nothing is left to train" in out
    assert "trainer.max_epochs (1)" in out
    out = run("fit", *settings, "--ckpt_path", "last", "--trainer.max_steps", "2")
    assert "trainer.max_steps (2)" in out
    assert "Nothing" not in run("fit", *settings, "--ckpt_path", "last", "--trainer.max_epochs", "2")


@pytest.mark.parametrize("limit", ["trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches"])
def test_a_run_without_a_step_is_told(run, limit):
    assert f"Nothing will train: {limit} is 0" in run("fit", f"--{limit}", "0", "--evaluation", "null")
