"""A base in parts trains, judges, answers and resumes as a whole one, to the last byte."""

import json

import pytest
import torch
import yaml

from tests.distributed.runs import CONFIG, adapter_bytes, launch, metrics
from tests.random_base import save_random_llama, save_tokenizer

PARTS = ["--trainer.strategy", "ddp_sharded"]
WHOLE = ["--trainer.strategy", "ddp"]
CHECKPOINTING = ["--gradient_checkpointing.enabled", "true"]
USUAL = ["--data.batch_size", "2", "--trainer.max_steps", "3", "--evaluation.enabled", "false"]
JUDGED = ["--data.batch_size", "2", "--trainer.max_steps", "2", "--data.val", "nine.jsonl", *CHECKPOINTING]
JUDGED += ["--evaluation.every_n_validations", "1", "--evaluation.rows", "5", "--trainer.val_check_interval", "2"]
ACCUMULATED = ["--data.batch_size", "1", "--trainer.accumulate_grad_batches", "2", "--model.dropout", "0.1"]
ALIKE = {  # what slow runs differ in
    "checkpointing": CHECKPOINTING,
    "bf16": ["--model.compute_dtype", "bf16", *CHECKPOINTING],
    "plain": ["--model.fast", "false"],
    "plain-checkpointing": ["--model.fast", "false", *CHECKPOINTING],
    "accumulated": [*ACCUMULATED, "--trainer.max_steps", "2"],
    "top": ["--model.layers", "last:3", *CHECKPOINTING],
    "filler": ["--data.train", "nine.jsonl", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"],
    "none": ["--model.quantization", "none"],
    "fp4": ["--model.quantization", "fp4", "--model.double_quant", "false"],
    "tied": ["--model.base", "tiny"],
    "noise": ["--model.neftune_alpha", "5"],
    "host": ["--model.base", "tiny", "--dry_batch"],
}
del ALIKE["host"]


def fit(name, *arguments, config="parts.yaml"):
    return ["fit", "--config", config, "--trainer.default_root_dir", name, *USUAL, *arguments]


@pytest.fixture(scope="module")
def runs(folder):
    """The folder of the runs, with a base of four layers that ties nothing, and its configs."""
    (folder / "untied").mkdir()
    save_tokenizer(folder / "untied", (folder / "rows.jsonl").read_text().splitlines(), size=512)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512}
    save_random_llama(folder / "untied", torch.float32, **sizes, tie_word_embeddings=False)
    hooks = {
        "parts": {"class_path": "hooks.Weigh"},
        "saves": {"class_path": "hooks.SaveAt", "init_args": {"batches": [3], "folder": "saved"}},
        "spoilt": {"class_path": "hooks.Spoil", "init_args": {"rank": 1}},
    }
    for name, hook in hooks.items():
        model, trainer = {**CONFIG["model"], "base": "untied"}, {**CONFIG["trainer"], "callbacks": [hook]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model, "trainer": trainer}))
    return folder


@pytest.fixture(scope="module")
def said(runs):
    """What one launch of two processes said."""
    commands = [fit("judged", *JUDGED, *WHOLE), fit("judged-parts", *JUDGED, *PARTS)]
    predict = ["predict", "--config", "judged-parts/config.yaml", "--data.predict", "nine.jsonl"]
    commands += [[*predict, "--trainer.default_root_dir", name] for name in ("judged", "judged-parts")]
    commands[-2] += WHOLE
    skip = ["--model.on_nonfinite", "skip"]
    commands += [fit("spoilt", *skip, *WHOLE, config="spoilt.yaml")]
    commands += [fit("spoilt-parts", *skip, *PARTS, config="spoilt.yaml")]
    commands += [fit("saves", *ACCUMULATED, *PARTS, config="saves.yaml")]
    commands += [fit("resumed", *ACCUMULATED, *WHOLE, "--ckpt_path", "saved/3.ckpt")]
    return launch(runs, commands)


def assert_same(runs, name, other=None):
    other = other or f"{name}-parts"
    assert adapter_bytes(runs / name) == adapter_bytes(runs / other)
    for column in ("train_loss", "grad_norm"):
        assert metrics(runs / name, column) == metrics(runs / other, column)
        assert metrics(runs / name, column)


@pytest.mark.usefixtures("said")
def test_it_trains_and_judges_as_a_whole_one(runs):
    assert_same(runs, "judged")
    for column in ("val_loss", "val_stop_rate"):
        assert metrics(runs / "judged", column) == metrics(runs / "judged-parts", column)
        assert metrics(runs / "judged", column)
    one, other = (json.loads((runs / name / "evaluation.json").read_text()) for name in ("judged", "judged-parts"))
    assert one == other


@pytest.mark.usefixtures("said")
def test_each_process_holds_half_of_it(runs):
    whole, parts = (
        [json.loads((runs / name / f"held-{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("judged", "judged-parts")
    )
    for each in zip(*whole, *parts):
        assert each[2] <= 0.51 * each[0]


@pytest.mark.usefixtures("said")
def test_answers_are_those_of_a_whole_one(runs):
    one, other = ((runs / name / "predictions.jsonl").read_text() for name in ("judged", "judged-parts"))
    assert len(one.splitlines()) == 9
    assert one == other


def test_a_loss_that_is_not_finite_is_looked_for_by_all(runs, said):
    assert_same(runs, "spoilt")
    one, other = (
        json.loads((runs / name / "nonfinite-step-1.json").read_text()) for name in ("spoilt", "spoilt-parts")
    )
    assert one["ranks"] == other["ranks"]
    assert one["ranks"][1]["rows"]


@pytest.mark.usefixtures("said")
def test_a_checkpoint_of_it_goes_on_with_a_whole_one(runs):
    assert adapter_bytes(runs / "saves") == adapter_bytes(runs / "resumed")


@pytest.mark.slow
def test_whatever_is_trained_and_how_the_bytes_are_the_same(runs):
    """And a checkpoint of a whole one goes on in parts."""
    commands = [
        fit(f"{name}{suffix}", *more, *strategy)
        for name, more in ALIKE.items()
        for suffix, strategy in (("", WHOLE), ("-parts", PARTS))
    ]
    launch(runs, commands, timeout=900)
    for name in ALIKE:
        assert_same(runs, name)
