"""A run folder is kept to one run and one process; its config, metrics and predictions are whole and in order."""

import csv
import itertools
import json

import pytest
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import DummyLogger

from qlora_lightning import AdapterCheckpoint, PredictionWriter, QLoRAModule
from qlora_lightning.callbacks.run_folder import MetricsLogger, RunFolder, locking
from qlora_lightning.cli import main
from tests.adapters import make_run
from tests.equality import metrics, read_checkpoint
from tests.errors import MachineFailed, rejects


def test_the_config_is_in_the_folder_and_the_loggers(fit, tmp_path):
    config, found = {"model": {"rank": 2, "alpha": None}, "data": {"system": "Grüße, 日本"}}, []
    logger = DummyLogger()
    logger.log_hyperparams = found.append
    fit(RunFolder(config), logger=logger, max_steps=1, limit_val_batches=0)
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == found[0] == config
    assert "Grüße, 日本" in text


@pytest.mark.slow
def test_a_run_that_was_killed_before_it_saved_leaves_nothing_when_it_starts_again(fit, tmp_path):
    options = {"max_steps": 1, "limit_val_batches": 0}
    fit(RunFolder({"model": {"rank": 2}}), **options)
    (tmp_path / "run" / ".unfinished-4711-config.yaml").write_text("model:")
    fit(RunFolder({"model": {"rank": 2}}), **options)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]
    fit(RunFolder({"model": {"rank": 4}}), **options)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.yaml", "earlier-config.yaml"]


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


class DiesOnceSaved(QLoRAModule):
    """Its machine fails when the callbacks have saved, before Lightning hands the line of the step to the loggers."""

    def on_train_batch_end(self, *_):
        if self.global_step == self.trainer.log_every_n_steps * 3:
            raise MachineFailed


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"log_every_n_steps": 2, "max_epochs": 2}, marks=pytest.mark.slow)]
)
def test_a_kill_after_a_save_loses_no_line(fit, make_module, tmp_path, options):
    def train(folder, module=None, **more):
        callbacks = (RunFolder({}), LearningRateMonitor(), AdapterCheckpoint(1))
        logger = MetricsLogger(tmp_path / folder)
        fit(*callbacks, module=module, logger=logger, folder=folder, limit_val_batches=1, **options, **more)
        return logger.file.read_text()

    whole = train("whole")
    with pytest.raises(MachineFailed):
        train("killed", make_module(DiesOnceSaved))
    run = tmp_path / "killed"
    assert read_checkpoint(run)["global_step"] == 3 * options.get("log_every_n_steps", 1)
    assert len(metrics(run, "train_loss")) == 2
    assert train("killed", ckpt_path=str(run / "checkpoints" / "last.ckpt")) == whole


def test_half_a_line_is_removed_wherever_a_kill_has_cut_it(logger):
    logger.log_metrics({"train_loss": 1.5, "val_loss": 2.5}, step=0)
    whole, line = logger.file.read_text(), "1,1.25,3.5"  # without its end
    for length in range(1, len(line) + 1):
        logger.file.write_text(whole + line[:length])
        again = MetricsLogger(logger.save_dir)
        again.cut(1)
        assert logger.file.read_text() == whole
        again.log_metrics({"train_loss": 1.75}, step=1)
        assert logger.file.read_text() == whole + "1,1.75,\n"


@pytest.mark.parametrize("text", ["\ufeffstep;train_loss\n0.0;1.5\n", "step,train_loss\n0,1.5,high\n"])
def test_a_table_that_a_spreadsheet_saved_is_continued_or_set_aside(logger, text):
    logger.log_metrics({"train_loss": 1.5}, step=0)
    logger.file.write_text(text)
    resumed = MetricsLogger(logger.save_dir)
    resumed.cut(1)
    resumed.log_metrics({"train_loss": 1.25}, step=1)
    earlier = "" if "high" in text else "0,1.5\n"
    assert logger.file.read_text() == f"step,train_loss\n{earlier}1,1.25\n"
    assert earlier or logger.file.with_name("earlier-metrics.csv").read_text() == text


def test_two_do_not_train_in_one_folder_and_the_next_may_and_no_file_is_left(tmp_path):
    refused = rejects("run_folder.in_use", f"{tmp_path / 'run'}")
    with locking(tmp_path / "run"), locking(tmp_path / "elsewhere"), refused, locking(tmp_path / "run"):
        pass
    with locking(tmp_path / "run"):
        assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "checkpoints"]


@pytest.fixture
def dies_at(monkeypatch):
    """Let the machine fail at the call of that number for answers."""
    plain = QLoRAModule.answer

    def set_call(number):
        calls = itertools.count(1)

        def answer(*arguments, **options):
            if next(calls) == number:
                raise MachineFailed
            return plain(*arguments, **options)

        monkeypatch.setattr(QLoRAModule, "answer", answer)

    return set_call


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def predict(make_module, make_data, make_trainer, tmp_path):
    def run(rows, **options):
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = make_data(predict=str(file), max_new_tokens=2, **options)
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
    assert [(len(answer), line["stopped"]) for answer, line in zip(answers, lines, strict=True)] == [(2, False)] * 5
    assert "„" in (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["predictions.jsonl"]
    assert predict(rows[:3], batch_size=3)[0] == lines[:3]  # however rows are batched
    assert read_lines(tmp_path / "run" / "earlier-predictions.jsonl") == lines

    dies_at(3)
    with pytest.raises(MachineFailed):
        predict(rows, batch_size=2)
    unfinished = read_lines(tmp_path / "run" / "predictions.unfinished.jsonl")
    assert sorted(line["row"] for line in unfinished) == [0, 1, 2, 3]
    assert [lines[line["row"]] for line in unfinished] == unfinished


@pytest.mark.slow
def test_a_kill_in_an_evaluation_leaves_the_answers_that_there_are(tiny_base, dies_at, tmp_path):
    make_run(tmp_path / "run", tiny_base)
    command = ["evaluate", "--adapter", str(tmp_path / "run/adapter"), "--out", str(tmp_path / "out")]
    command += ["--max-new-tokens", "2"]
    dies_at(2)
    with pytest.raises(MachineFailed):
        main([*command, "--rows", "4"])
    unfinished = read_lines(tmp_path / "out" / "predictions.unfinished.jsonl")
    assert sorted((line["row"], line["side"]) for line in unfinished) == [(row, "base") for row in (0, 2, 4, 7)]
    dies_at(None)
    assert main([*command, "--rows", "4"]) == 0
    whole = {line["row"]: line for line in read_lines(tmp_path / "out" / "predictions.jsonl")}
    for line in unfinished:
        assert (line["place"], line["text"]) == (whole[line["row"]]["place"], whole[line["row"]]["base"]["answer"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["evaluation.json", "predictions.jsonl"]
