"""A run folder is kept to one run and one process; its config, metrics and predictions are whole and in order."""

import contextlib
import csv
import json

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger

from qlora_lightning import AdapterCheckpoint, Evaluation, GradientCheckpointing, PredictionWriter, QLoRAModule
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import RunFolder, locking, refuse_started_folder
from qlora_lightning.cli import main
from qlora_lightning.support.errors import UserError
from tests.adapters import make_run
from tests.dying import MachineFailed

# ---- config.yaml ----


def test_the_config_is_in_the_folder_and_the_loggers_and_one_that_refuses_it_ends_no_run(fit, tmp_path, capsys):
    config, found = {"model": {"rank": 2, "alpha": None}, "data": {"system": "Grüße, 日本"}}, []
    logger, refusing = DummyLogger(), DummyLogger()
    logger.log_hyperparams = found.append
    refusing.log_hyperparams = lambda params: {}["rank"]
    trainer, _ = fit(RunFolder(config), logger=[refusing, logger], max_steps=1, limit_val_batches=0)
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert [yaml.safe_load(text)] == found == [config]
    assert "Grüße, 日本" in text
    assert trainer.global_step == 1
    assert "DummyLogger does not take the config: KeyError: 'rank'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("callback", "options", "words"),
    [
        (AdapterCheckpoint, {"every_n_train_steps": 0}, "adapter_checkpoint.every_n_train_steps is 0: expected more"),
        (AdapterCheckpoint, {"every_minutes": -0.5}, "adapter_checkpoint.every_minutes is -0.5: expected more than 0"),
        (AdapterCheckpoint, {"save_top_k": -1}, "adapter_checkpoint.save_top_k is -1: expected 0 or more"),
        (Evaluation, {"rows": -1}, "evaluation.rows is -1: expected 0 or more"),
        (Evaluation, {"every_n_validations": 0}, "evaluation.every_n_validations is 0: expected 1 or more"),
        (Evaluation, {"scores": ["bleu"]}, "no score 'bleu'"),
        (GradientCheckpointing, {"every_n_layers": 0}, "gradient_checkpointing.every_n_layers is 0: expected 1"),
    ],
)
def test_settings_that_make_no_sense_are_rejected(callback, options, words):
    with pytest.raises(UserError, match=words):
        callback(**options)


def test_a_folder_that_cannot_be_written_to_is_rejected(fit, tmp_path):
    (tmp_path / "run").touch()
    for callback in (RunFolder({}), AdapterCheckpoint()):
        with pytest.raises(UserError, match=r"default_root_dir .*run cannot be written to: (File exists|Not a dir)"):
            fit(callback, limit_train_batches=1, limit_val_batches=0)


# ---- metrics.csv ----


@pytest.fixture
def logger(tmp_path):
    return MetricsLogger(tmp_path / "run")


def test_a_new_metric_widens_the_table_and_a_resumed_run_cuts_it_at_its_step(logger):
    logger.log_metrics({"train_loss": 1.5}, step=0)
    logger.log_metrics({"val_loss": 2.0, "val_perplexity": 7.4}, step=1)
    again = MetricsLogger(logger.save_dir)
    again.log_metrics({"val_loss": 3.0, "train_loss": 1.0}, step=1)  # in another order
    again.log_metrics({"grad_norm": 4.0}, step=2)
    lines = ["step,train_loss,val_loss,val_perplexity,grad_norm", "0,1.5,,,", "1,,2.0,7.4,", "1,1.0,3.0,,", "2,,,,4.0"]
    assert logger.file.read_text().splitlines() == lines
    resumed = MetricsLogger(logger.save_dir)
    resumed.cut(2)
    assert logger.file.read_text().splitlines() == lines[:4]
    resumed.log_metrics({"grad_norm": 4.0}, step=2)
    assert logger.file.read_text().splitlines() == lines
    resumed.cut(0)
    resumed.log_metrics({"train_loss": 9.0}, step=0)
    with logger.file.open(newline="") as handle:
        assert list(csv.DictReader(handle)) == [{"step": "0", "train_loss": "9.0"}]


@pytest.mark.parametrize("cut", [True, False])
def test_half_a_line_is_removed_wherever_a_kill_has_cut_it(logger, cut):
    logger.log_metrics({"train_loss": 1.5, "val_loss": 2.5}, step=0)
    whole, line = logger.file.read_text(), "1,1.25,3.5"  # without its end
    for length in range(1, len(line) + 1):
        logger.file.write_text(whole + line[:length])
        again = MetricsLogger(logger.save_dir)
        if cut:
            again.cut(1)
            assert logger.file.read_text() == whole
        again.log_metrics({"train_loss": 1.75}, step=1)
        assert logger.file.read_text() == whole + "1,1.75,\n"


# ---- one run in a folder ----


@pytest.mark.parametrize(
    ("trace", "table", "refused"),
    [
        ("metrics.csv", True, True),
        ("metrics.csv", False, False),
        ("checkpoints/step-000004.ckpt", False, True),
        ("checkpoints/unfinished", True, False),  # of a kill during the very first save
    ],
)
def test_a_folder_that_holds_a_run_is_rejected_with_the_two_ways_out(tmp_path, trace, table, refused):
    run = tmp_path / "run"
    (run / trace).parent.mkdir(parents=True)
    (run / trace).touch()
    message = r"run holds a run already.*`--ckpt_path last`.*`--trainer.default_root_dir "
    with pytest.raises(UserError, match=message) if refused else contextlib.nullcontext():
        refuse_started_folder(run, table=table)


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("runs/a/../a/checkpoints/step-000004.ckpt", True),
        ("runs/a/hpc_ckpt_1.ckpt", True),
        ("runs/a/mine/epoch.ckpt", True),
        ("runs/b/checkpoints/last.ckpt", False),
        ("runs/a/b/checkpoints/last.ckpt", False),  # of a run in a folder of its own inside
        ("last.ckpt", False),
    ],
)
def test_a_run_continues_from_a_checkpoint_of_its_own_and_no_other(tmp_path, monkeypatch, file, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt").touch()
    message = f"runs/a holds a run already, which would be lost. {file} is not of it."
    with contextlib.nullcontext() if own else pytest.raises(UserError, match=message):
        refuse_started_folder("runs/a", file)


def test_two_do_not_train_in_one_folder_and_the_next_may_and_no_file_is_left(tmp_path):
    refused = pytest.raises(UserError, match=r"^Another process trains in .*/run: wait until it has ended, or choose")
    with locking(tmp_path / "run"), locking(tmp_path / "elsewhere"), refused, locking(tmp_path / "run"):
        pass
    with locking(tmp_path / "run"):
        assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "checkpoints"]


# ---- predictions ----


@pytest.fixture
def dies_at(monkeypatch):
    """Let answers be two tokens long, and the machine fail at the call of that number."""
    plain, calls = QLoRAModule.answer, []

    def set_call(number):
        def answer(*arguments, **options):
            calls.append(number)
            if len(calls) == number:
                raise MachineFailed
            return plain(*arguments[:3], 2, **options)

        calls.clear()
        monkeypatch.setattr(QLoRAModule, "answer", answer)

    set_call(None)
    return set_call


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def predict(make_module, make_data, make_trainer, dies_at, tmp_path):
    def run(rows, **options):
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = make_data(predict=str(file), **options)
        answers = make_trainer(PredictionWriter()).predict(make_module(), datamodule=data)
        return read_lines(tmp_path / "run" / "predictions.jsonl"), [a for batch in answers for a in batch], data

    return run


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_each_row_has_its_prediction_in_order_and_a_kill_leaves_those_that_there_are(predict, dies_at, tmp_path):
    rows = [{"instruction": "Say " + "so " * (9 - n), "output": f"ja „{n}“"} for n in range(4)]
    rows.append({"instruction": "Count to 3."})
    lines, answers, data = predict(rows)
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["input"] for line in lines] == rows
    assert [line["reference"] for line in lines] == [row.get("output") for row in rows]
    assert [line["prediction"] for line in lines] == [data.tokenizer.decode(answer) for answer in answers]
    assert "„" in (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["predictions.jsonl"]
    assert predict(rows, batch_size=3)[0] == lines  # however rows are batched

    dies_at(3)
    with pytest.raises(MachineFailed):
        predict(rows, batch_size=2)
    unfinished = read_lines(tmp_path / "run" / "predictions.unfinished.jsonl")
    assert sorted(line["row"] for line in unfinished) == [0, 1, 2, 3]
    assert [lines[line["row"]] for line in unfinished] == unfinished


def test_a_kill_in_an_evaluation_leaves_the_answers_that_there_are(tiny_base, dies_at, tmp_path):
    make_run(tmp_path / "run", tiny_base)
    command = ["evaluate", "--adapter", str(tmp_path / "run/adapter"), "--out", str(tmp_path / "out"), "--batch-size=2"]
    dies_at(3)
    with pytest.raises(MachineFailed):
        main([*command, "--rows", "4"])
    unfinished = read_lines(tmp_path / "out" / "predictions.unfinished.jsonl")
    assert sorted((line["row"], line["side"]) for line in unfinished) == [(row, "base") for row in range(4)]
    dies_at(None)
    assert main([*command, "--rows", "4"]) == 0
    whole = {line["row"]: line for line in read_lines(tmp_path / "out" / "predictions.jsonl")}
    for line in unfinished:
        assert (line["place"], line["text"]) == (whole[line["row"]]["place"], whole[line["row"]]["base"]["answer"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["evaluation.json", "predictions.jsonl"]
