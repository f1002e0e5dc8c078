import json
import re

import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, Evaluation
from qlora_lightning.callbacks import evaluation
from qlora_lightning.evaluation.judge import cut_rows
from qlora_lightning.model.loss import TokenStatistics
from qlora_lightning.support.errors import UserError
from tests.equality import same

COUNTED = ["exact_match", "rouge_l", "chrf"]  # of text that is neither JSON nor a number


@pytest.fixture
def figures(tmp_path):
    """What evaluation.json holds: base and adapter by metric."""

    def read():
        found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        return {name: (each["base"]["value"], each["adapter"]["value"]) for name, each in found["metrics"].items()}

    return read


class Modes(Callback):
    """Takes down, before the comparison, what it must leave as it was."""

    def on_train_end(self, trainer, pl_module):
        self.adapter = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        self.kinds = {name: type(module) for name, module in pl_module.named_modules()}
        pl_module.train()

    def on_fit_end(self, trainer, pl_module):
        self.training = {name: module.training for name, module in pl_module.named_modules()}


def judge(module, data):
    statistics = TokenStatistics()
    module.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            statistics.update(module.compute_loss(batch))
    return {name: float(value) for name, value in statistics.compute().items()}


def test_base_and_best_adapter_are_judged_and_the_last_one_stays(
    fit, make_module, make_data, adapter_of, assert_same, figures, tmp_path
):
    # A learning rate at which the loss rises again: the best adapter is not the last.
    options = {"val_check_interval": 1, "limit_train_batches": 3, "max_epochs": 1}
    data, checkpoint = make_data(), AdapterCheckpoint(mode="max")  # "best" is the worst: surely not the last
    _, module = fit(modes := Modes(), Evaluation(rows=0), checkpoint, data=data, **options)
    found = figures()
    assert_same(adapter_of(module), modes.adapter)
    assert checkpoint.best[0][1] != "step-000003.ckpt"
    untouched = make_module()
    untouched.configure_model()
    for name, value in judge(untouched, data).items():
        assert found[name][0] == pytest.approx(value, rel=1e-3)
    assert found["loss"][1] == pytest.approx(checkpoint.best[0][0], rel=1e-3)
    assert found["loss"][1] != pytest.approx(judge(module, data)["loss"], rel=1e-3)
    untouched.load_state_dict(checkpoint.read_best(tmp_path / "run"))
    assert found["loss"][1] == pytest.approx(judge(untouched, data)["loss"], rel=1e-3)


def test_answers_of_both_are_scored_and_shown_beside_what_was_expected(fit, figures, capsys, tmp_path):
    fit(Evaluation(rows=4, samples=2, max_new_tokens=3), AdapterCheckpoint(), limit_train_batches=1)
    text = capsys.readouterr().out
    table = text[text.index("Validation rows") :]
    first_words = ["loss", "perplexity", "token", "exact", "ROUGE-L", "chrF++", "stop", "answer"]
    assert re.findall(r"│ ([\w+-]+) .*│", table)[: len(first_words)] == first_words
    assert re.search(r"prompt +│ Count to 1\. Please\. +│", text)
    assert re.search(r"expected +│ 1 2 ", text)
    assert "4 alike" in text
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (content["rows"], content["answered_rows"], content["max_new_tokens"]) == (16, 4, 3)
    assert [sample.keys() for sample in content["samples"]] == [{"prompt", "expected", "base", "adapter"}] * 2
    assert content["metrics"]["exact_match"]["base"].keys() == {"value", "low", "high"}
    assert content["metrics"]["stop_rate"]["difference"].keys() == {"value", "low", "high"}


def test_the_model_is_restored_when_judging_fails(fit, monkeypatch, adapter_of, assert_same):
    monkeypatch.setattr(evaluation, "judge_rows", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    modes, modules = Modes(), []

    class Keep(Callback):
        def on_fit_start(self, trainer, pl_module):
            modules.append(pl_module)

    with pytest.raises(ZeroDivisionError):
        fit(modes, Keep(), Evaluation(), AdapterCheckpoint(mode="max"), val_check_interval=1, limit_train_batches=3)
    assert_same(adapter_of(modules[0]), modes.adapter)


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"fast_dev_run": True}])
def test_without_validation_or_in_a_trial_run_nothing_is_compared(fit, tmp_path, options):
    fit(Evaluation(), limit_train_batches=1, **options)
    assert not (tmp_path / "run" / "evaluation.json").exists()


class Logged(Callback):
    """Takes down what each validation logged."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_every_second_validation_answers_rows_in_the_pass_that_makes_the_loss(fit, make_data):
    logged, data = Logged(), make_data()
    callback = Evaluation(rows=3, every_n_validations=2, max_new_tokens=4)
    _, module = fit(callback, logged, data=data, val_check_interval=2, limit_train_batches=4)
    assert len(logged.seen) == 2
    first, second = logged.seen
    assert "val_loss" in first
    assert not {f"val_{name}" for name in COUNTED} & first.keys()
    assert {f"val_{name}" for name in [*COUNTED, "stop_rate", "answer_tokens"]} <= second.keys()
    rows = [row for batch in data.val_dataloader() for row in cut_rows(batch)][:3]
    answers = module.answer([row.prompt for row in rows], data.stop_ids, 4)
    assert second["val_answer_tokens"] == pytest.approx(sum(map(len, answers)) / 3)
    assert second["val_stop_rate"] == pytest.approx(sum(len(each) < 4 for each in answers) / 3)


class End(Callback):
    """Takes down the end of a training: adapter, and the next numbers of torch's generator."""

    def on_train_end(self, trainer, pl_module):
        self.state = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        self.generator = torch.get_rng_state()


def test_answering_during_validations_changes_nothing_in_training(fit, make_module):
    ends = []
    for callbacks in ([], [Evaluation(rows=4, every_n_validations=1, max_new_tokens=4)]):
        module = make_module(dropout=0.1)
        fit(end := End(), *callbacks, module=module, val_check_interval=2, limit_train_batches=6)
        ends.append({"state": end.state, "generator": end.generator})
    assert same(*ends)


def test_a_resumed_run_goes_on_counting_validations(fit, tmp_path):
    options = {"val_check_interval": 2, "limit_train_batches": 6}

    def run(logged, *callbacks, **more):
        return fit(Evaluation(rows=2, every_n_validations=2, max_new_tokens=2), logged, *callbacks, **options, **more)

    whole = Logged()
    run(whole, AdapterCheckpoint(), max_epochs=1)
    first, second = Logged(), Logged()
    run(first, AdapterCheckpoint(), folder="again", max_epochs=1, max_steps=2)
    run(second, AdapterCheckpoint(), folder="again", max_epochs=1, ckpt_path=tmp_path / "again/checkpoints/last.ckpt")
    scored = [["val_stop_rate" in seen for seen in each.seen] for each in (whole, first, second)]
    assert scored == [[False, True, True], [False], [True, True]]  # a metric stays until it is logged again
    assert whole.seen[1] == second.seen[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": -1}, "evaluation.rows is -1: expected 0 or more"),
        ({"batch_size": 0}, "evaluation.batch_size is 0: expected 1 or more"),
        ({"every_n_validations": -2}, "evaluation.every_n_validations is -2: expected 1 or more"),
        ({"every_n_validations": 0}, "evaluation.every_n_validations is 0: expected 1 or more"),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens is 0: expected 1 or more"),
        ({"scores": ["bleu"]}, "no score 'bleu'"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Evaluation(**options)
