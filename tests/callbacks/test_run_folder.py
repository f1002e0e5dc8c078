"""A run folder is kept to one run and one process; its config, metrics and predictions are whole and in order."""

import contextlib
import csv
import json
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger

from qlora_lightning import AdapterCheckpoint, PredictionWriter, QLoRAModule
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.run_folder import RunFolder, is_resumed, locking, refuse_started_folder
from qlora_lightning.support.errors import UserError


def read(file):
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


# ---- config.yaml ----


class Loud(DummyLogger):
    def __init__(self, fault=None):
        super().__init__()
        self.fault, self.params = fault, None

    def log_hyperparams(self, params, *args, **kwargs):
        if self.fault:
            raise self.fault
        self.params = params


def test_the_config_is_in_the_folder_and_the_loggers_and_one_that_refuses_it_ends_no_run(fit, tmp_path, capsys):
    config = {"model": {"rank": 2, "alpha": None}, "data": {"system": "Grüße, 日本"}}
    logger, refusing = Loud(), Loud(ValueError("rank was 4"))
    trainer, _ = fit(RunFolder(config), logger=[refusing, logger], max_steps=1, limit_val_batches=0)
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == logger.params == config
    assert "Grüße, 日本" in text
    assert trainer.global_step == 1
    assert "Loud does not take the config: ValueError: rank was 4" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to_is_rejected(fit, tmp_path):
    (tmp_path / "run").touch()
    for callback in (RunFolder({}), AdapterCheckpoint()):
        with pytest.raises(UserError, match=r"default_root_dir .*run cannot be written to: (File exists|Not a dir)"):
            fit(callback, limit_train_batches=1, limit_val_batches=0)


# ---- metrics.csv ----


@pytest.fixture
def logger(tmp_path):
    return MetricsLogger(tmp_path / "run")


def test_a_new_metric_widens_the_table_also_of_a_run_that_is_resumed(logger):
    logger.log_metrics({"train_loss": 1.5}, step=0)
    logger.log_metrics({"val_loss": 2.0, "val_perplexity": 7.4}, step=1)
    again = MetricsLogger(logger.save_dir)
    again.log_metrics({"val_loss": 3.0, "train_loss": 1.0}, step=1)  # in another order
    again.log_metrics({"grad_norm": 4.0}, step=2)
    assert logger.file.read_text().splitlines() == [
        "step,train_loss,val_loss,val_perplexity,grad_norm",
        "0,1.5,,,",
        "1,,2.0,7.4,",
        "1,1.0,3.0,,",
        "2,,,,4.0",
    ]
    assert again.rows == 4


@pytest.mark.parametrize(
    ("rows", "before_step", "kept"),
    [(0, 0, ""), (2, 0, "01"), (2, 2, "01"), (1, 3, "012"), (0, 2, "01"), (9, 0, "0123")],
)
def test_cut_removes_the_lines_behind_a_row_but_those_of_earlier_steps(logger, rows, before_step, kept):
    for step in range(4):
        logger.log_metrics({"train_loss": 1.0}, step=step)
    logger.cut(rows, before_step)
    assert "".join(row["step"] for row in read(logger.file)) == kept
    assert logger.rows == len(kept)
    logger.log_metrics({"train_loss": 9.0}, step=7)
    assert read(logger.file)[-1] == {"step": "7", "train_loss": "9.0"}
    assert logger.rows == len(kept) + 1


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
        assert again.rows == 2


def test_a_full_disk_leaves_the_table_and_is_reported(logger, monkeypatch):
    logger.log_metrics({"train_loss": 1.0}, step=0)
    before = logger.file.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"run cannot be written to: disk full"):
        logger.log_metrics({"val_loss": 1.0}, step=1)
    assert logger.file.read_text() == before


def test_the_metrics_of_a_resumed_run_are_those_of_one_that_never_stopped(fit, killed_fit, tmp_path):
    def train(run, folder, **more):
        options = {"max_epochs": 2, "limit_val_batches": 1, "accumulate_grad_batches": 2, "val_check_interval": 4}
        writers = RunFolder({}), AdapterCheckpoint()
        run(*writers, logger=MetricsLogger(tmp_path / folder), folder=folder, **options, **more)

    train(fit, "whole")
    train(killed_fit, "cut", after=13)
    train(fit, "cut", ckpt_path=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert read(tmp_path / "cut" / "metrics.csv") == read(tmp_path / "whole" / "metrics.csv")


# ---- one run in a folder ----


@pytest.mark.parametrize(
    ("trace", "table", "refused"),
    [
        ("metrics.csv", True, True),
        ("metrics.csv", False, False),
        ("checkpoints/last.ckpt", True, True),
        ("checkpoints/step-000004.ckpt", False, True),
        ("checkpoints/unfinished.ckpt", False, False),  # of a kill during the very first save
    ],
)
def test_a_folder_that_holds_a_run_is_rejected_with_the_two_ways_out(tmp_path, trace, table, refused):
    run = tmp_path / "run"
    (run / trace).parent.mkdir(parents=True)
    refuse_started_folder(run, table=table)
    (run / trace).touch()
    message = r"run holds a run already.*`--ckpt_path last`.*`--trainer.default_root_dir "
    with pytest.raises(UserError, match=message) if refused else contextlib.nullcontext():
        refuse_started_folder(run, table=table)


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("runs/a/checkpoints/last.ckpt", True),
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
    trainer = SimpleNamespace(ckpt_path=file, default_root_dir=str(tmp_path / "runs" / "a"), global_step=0)
    assert is_resumed(trainer) == own
    message = f"runs/a holds a run already, which would be lost. {file} is not of it."
    with contextlib.nullcontext() if own else pytest.raises(UserError, match=message):
        refuse_started_folder("runs/a", file)


def test_two_do_not_train_in_one_folder_and_the_next_may_and_no_file_is_left(tmp_path):
    refused = pytest.raises(UserError, match=r"^Another process trains in .*/run: wait until it has ended, or choose")
    with locking(tmp_path / "run"), locking(tmp_path / "elsewhere"), refused, locking(tmp_path / "run"):
        pass
    with locking(tmp_path / "run"):
        assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "checkpoints"]


# ---- predictions.jsonl ----


@pytest.fixture
def predict(make_module, make_data, make_trainer, monkeypatch, tmp_path):
    # Answers of a random base run on until they are cut: two tokens will do.
    plain = QLoRAModule.answer
    monkeypatch.setattr(QLoRAModule, "answer", lambda *arguments, **options: plain(*arguments[:3], 2, **options))

    def run(rows, **options):
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data, module = make_data(predict=str(file), **options), make_module()
        answers = make_trainer(PredictionWriter()).predict(module, datamodule=data)
        lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines], [a for batch in answers for a in batch], data

    return run


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_each_row_has_its_prediction_in_order_beside_its_own_answer_however_rows_are_batched(predict, tmp_path):
    rows = [{"instruction": "Say " + "so " * (9 - n), "output": f"ja „{n}“"} for n in range(4)]
    rows.append({"instruction": "Count to 3."})
    lines, answers, data = predict(rows)
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["input"] for line in lines] == rows
    assert [line["reference"] for line in lines] == [row.get("output") for row in rows]
    assert [line["prediction"] for line in lines] == [data.tokenizer.decode(answer) for answer in answers]
    assert "„" in (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["predictions.jsonl"]
    assert predict(rows, batch_size=3)[0] == lines
