import json
import shutil
from unittest.mock import Mock

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, Evaluation, UserError
from tests.equality import same
from tests.rows import write_rows
from tests.steps import trainable_tensors

SCORES = ["exact_match", "rouge_l", "chrf"]  # of text that is neither JSON nor a number


def read_figures(folder):
    return json.loads((folder / "run" / "evaluation.json").read_text())


class End(Callback):
    """Notes the end of a training, before the comparison: adapter, and the next numbers of torch's generator."""

    def on_train_end(self, trainer, pl_module):
        self.module = pl_module
        self.adapter = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        self.generator = torch.get_rng_state()


class Logged(Callback):
    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_base_and_best_adapter_are_compared(fit, make_module, make_data, make_trainer, capsys, caplog, tmp_path):
    """And the last adapter stays in the module."""

    def validate(module):
        (metrics,) = make_trainer().validate(module, make_data(), verbose=False)
        return {name.removeprefix("val_"): value for name, value in metrics.items()}

    options = {"val_check_interval": 1, "limit_train_batches": 3, "max_epochs": 1}
    data, checkpoint = make_data(), AdapterCheckpoint()
    checkpoint.mode = "max"  # "best" is the worst: surely not the last
    other = write_rows(tmp_path / "other.jsonl", [{"text": f"Rain {'and wind ' * n}."} for n in range(5)])
    forgetting = {"path": str(other), "format": "text"}
    evaluation = Evaluation(rows=4, samples=2, max_new_tokens=3, forgetting=forgetting, forgetting_rows=3)
    _, module = fit(end := End(), evaluation, checkpoint, data=data, **options)
    assert same(trainable_tensors(module), end.adapter)
    assert checkpoint.best[0][1] != "step-000003.ckpt"
    found = read_figures(tmp_path)
    untouched = make_module()
    untouched.configure_model()
    for name, value in validate(untouched).items():
        assert found["metrics"][name]["base"]["value"] == pytest.approx(value, rel=1e-3)
    (batch,) = data.read_other_rows(forgetting, 3)
    assert len(batch["row_ids"]) == 3
    assert "forgetting: 3 rows (text)" in caplog.text
    with torch.no_grad():
        sums = untouched.compute_loss(batch)
    on_other_text = float(sums.loss_sum / sums.count)
    assert found["metrics"]["forgetting_loss"]["base"]["value"] == pytest.approx(on_other_text, rel=1e-3)
    loss = found["metrics"]["loss"]["adapter"]["value"]
    assert loss == pytest.approx(checkpoint.best[0][0], rel=1e-3)
    assert loss != pytest.approx(validate(module)["loss"], rel=1e-3)
    untouched.load_state_dict(checkpoint.read_best(tmp_path / "run"))
    assert loss == pytest.approx(validate(untouched)["loss"], rel=1e-3)

    # rows that were answered are scored, and shown beside what was expected
    assert (found["rows"], found["answered_rows"], found["max_new_tokens"]) == (16, 4, 3)
    assert [sample.keys() for sample in found["samples"]] == [{"prompt", "expected", "base", "adapter"}] * 2
    assert found["metrics"]["exact_match"]["base"].keys() == {"value", "low", "high"}
    text = capsys.readouterr().out
    assert "16 validation rows, 4 of them answered" in text
    assert "loss on other" in text  # "text" in the next line
    assert "│ Count to 1. Please. " in text


@pytest.mark.slow
def test_the_card_has_what_the_hub_shows(fit, make_module, make_data, rows_file, tiny_base, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: datasets.Dataset.from_json(str(rows_file)))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **options: Mock(hash="", config_id=""))
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    data = make_data(train=[str(rows_file), {"path": "org/data", "split": "train"}])
    forgetting = {"path": str(rows_file), "rows": 2}
    module = make_module(base=str(base))
    fit(AdapterCheckpoint(), Evaluation(rows=4, forgetting=forgetting), module=module, data=data, limit_train_batches=1)
    card = ModelCard.load(tmp_path / "run" / "adapter" / "README.md").data
    assert (card.license, card.pipeline_tag, card.datasets) == ("llama3.2", "text-generation", ["org/data"])
    assert str(tmp_path) not in str(card)
    values = {result.metric_type: result.metric_value for result in card.eval_results}
    assert values == {name: sides["adapter"]["value"] for name, sides in read_figures(tmp_path)["metrics"].items()}
    names = {result.dataset_name for result in card.eval_results}
    assert names == {"16 validation rows, 4 of them answered", "other text"}


@pytest.mark.parametrize("kind", [UserError, torch.OutOfMemoryError])
def test_a_run_is_not_lost_to_the_memory_of_its_last_evaluation(fit, monkeypatch, capsys, tmp_path, kind):
    def run_out(*_, **options):
        raise kind("Out of memory on cpu.")

    for name in ("evaluate_sides", "answer_rows"):
        monkeypatch.setattr(f"qlora_lightning.evaluation.row_results.{name}", run_out)
    fit(end := End(), Evaluation(every_n_validations=1), limit_train_batches=1)
    assert end.adapter
    words = "Not evaluated at step 1: Out of memory on cpu. `qlora-lightning evaluate` can do it later."
    assert words in capsys.readouterr().out
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"fast_dev_run": True}])
def test_without_validation_or_in_a_trial_run_nothing_is_compared(fit, tmp_path, options):
    fit(Evaluation(), limit_train_batches=1, **options)
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.slow
def test_a_score_of_an_earlier_validation_ranks_no_later_adapter(fit):
    saved = AdapterCheckpoint(monitor="val_chrf", mode="max", save_top_k=4)
    scored = Evaluation(rows=2, every_n_validations=2, max_new_tokens=2)
    fit(saved, scored, val_check_interval=2, limit_val_batches=1)  # validations after steps 2, 4, 6 and 8
    assert sorted(name for _, name in saved.best) == ["step-000004.ckpt", "step-000008.ckpt"]


@pytest.mark.slow
def test_rows_are_answered_every_second_validation_and_change_no_byte(fit, make_data, make_module, rows_file, tmp_path):
    options = {"val_check_interval": 2, "limit_train_batches": 4}
    fit(plain := End(), module=make_module(dropout=0.1), **options)
    logged, data, module = Logged(), make_data(predict=str(rows_file)), make_module(dropout=0.1)
    answers = {"rows": 3, "every_n_validations": 2, "max_new_tokens": 4}
    fit(Evaluation(**answers), logged, end := End(), data=data, module=module, **options)
    assert same(end.adapter, plain.adapter)
    assert same(end.generator, plain.generator)
    first, second = logged.seen
    assert "val_loss" in first
    assert not {f"val_{name}" for name in SCORES} & first.keys()
    assert {f"val_{name}" for name in [*SCORES, "stop_rate", "answer_tokens"]} <= second.keys()
    data.setup("predict")
    prompts = [prompt.ids for batch in data.predict_dataloader() for prompt in batch["prompts"]]
    found = module.answer([prompts[row] for row in (0, 7, 15)], data.stop_ids, 4)  # spread over all 16
    assert second["val_answer_tokens"] == pytest.approx(sum(map(len, found)) / 3)
    assert second["val_stop_rate"] == pytest.approx(sum(len(each) < 4 for each in found) / 3)
    # a resumed run continues counting
    first, rest = Logged(), Logged()
    for seen, ends in ((first, {"max_steps": 2}), (rest, {"ckpt_path": tmp_path / "again/checkpoints/last.ckpt"})):
        module = make_module(dropout=0.1)
        fit(Evaluation(**answers), seen, AdapterCheckpoint(), module=module, folder="again", **ends, **options)
    assert ["val_stop_rate" in each for each in first.seen + rest.seen] == [False, True]
