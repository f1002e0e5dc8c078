"""A sharded base trains, judges, answers and resumes as a whole one, to the last byte."""

import json
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from torch.distributed.fsdp import FSDPModule

from qlora_lightning import ShardedDDPStrategy
from qlora_lightning.model.guards.checks import check_trainer
from qlora_lightning.support.errors import UserError
from tests.distributed.runs import CONFIG, environment, launch, metrics
from tests.equality import adapter_bytes
from tests.random_base import save_random_llama, save_tokenizer

SHARDED = ["--trainer.strategy", "ddp_sharded"]
WHOLE = ["--trainer.strategy", "ddp"]
CHECKPOINTING = ["--gradient_checkpointing.enabled", "true"]
USUAL = ["--data.batch_size", "2", "--trainer.max_steps", "3", "--evaluation.enabled", "false"]
JUDGED = ["--data.batch_size", "2", "--trainer.max_steps", "2", "--data.val", "nine.jsonl", *CHECKPOINTING]
JUDGED += [
    "--evaluation.enabled",
    "true",
    "--evaluation.every_n_validations",
    "1",
    "--evaluation.rows",
    "5",
    "--trainer.val_check_interval",
    "2",
]
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
    "rows": ["--model.lora_options", '{"trainable_token_indices": [1, 2, 3]}'],
    "tied-rows": ["--model.base", "tiny", "--model.lora_options", '{"trainable_token_indices": [1, 2, 3]}'],
    "dora": ["--model.lora_options", '{"use_dora": true}'],
}
PAIRS = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2"]


def fit(name, *arguments, config="sharded.yaml"):
    return ["fit", "--config", config, "--trainer.default_root_dir", name, *USUAL, *arguments]


def both(name, *arguments, **config):
    """The commands of a run with a base each, and of the same with a sharded one."""
    return [fit(name, *arguments, *WHOLE, **config), fit(f"{name}-sharded", *arguments, *SHARDED, **config)]


@pytest.fixture(scope="module")
def runs(folder):
    """The folder of the runs, with a base of four layers that ties nothing, and its configs."""
    (folder / "untied").mkdir()
    save_tokenizer(folder / "untied", (folder / "rows.jsonl").read_text().splitlines(), size=512)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512}
    save_random_llama(folder / "untied", torch.float32, **sizes, tie_word_embeddings=False)
    hooks = {
        "sharded": {"class_path": "hooks.Weigh"},
        "saves": {"class_path": "hooks.SaveAt", "init_args": {"batches": [4], "folder": "saved"}},
        "spoilt": {"class_path": "hooks.Spoil", "init_args": {"rank": 1}},
    }
    for name, hook in hooks.items():
        model, trainer = {**CONFIG["model"], "base": "untied"}, {**CONFIG["trainer"], "callbacks": [hook]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model, "trainer": trainer}))
    return folder


@pytest.fixture(scope="module")
def said(runs):
    """What one launch of two processes said."""
    commands = both("judged", *JUDGED)
    predict = ["predict", "--config", "judged-sharded/config.yaml", "--data.predict", "nine.jsonl"]
    commands += [[*predict, "--trainer.default_root_dir", name] for name in ("judged", "judged-sharded")]
    commands[-2] += WHOLE
    commands += [fit("saves", *ACCUMULATED, *SHARDED, config="saves.yaml")]
    commands += [fit("resumed", *ACCUMULATED, *WHOLE, "--ckpt_path", "saved/4.ckpt")]
    return launch(runs, commands)


def assert_same(runs, name, other=None):
    other = other or f"{name}-sharded"
    assert adapter_bytes(runs / name) == adapter_bytes(runs / other)
    for column in ("train_loss", "grad_norm"):
        assert str(metrics(runs / name, column)) == str(metrics(runs / other, column))  # one may be NaN
        assert metrics(runs / name, column)


def assert_same_updates(runs, name):
    one, other = (
        json.loads((runs / each / "manifest.json").read_text())["adapter_updates"] for each in (name, f"{name}-sharded")
    )
    assert one["q_proj"]
    assert one == other


@pytest.mark.usefixtures("said")
def test_it_trains_and_judges_as_a_whole_one(runs):
    assert_same(runs, "judged")
    for column in ("val_loss", "val_stop_rate"):
        assert metrics(runs / "judged", column) == metrics(runs / "judged-sharded", column)
        assert metrics(runs / "judged", column)
    one, other = (json.loads((runs / name / "evaluation.json").read_text()) for name in ("judged", "judged-sharded"))
    assert one == other


@pytest.mark.usefixtures("said")
def test_the_report_says_how_far_weights_moved_as_of_a_whole_one(runs):
    assert_same_updates(runs, "judged")


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_holds_half_of_layers_and_of_embedding_and_head(runs, rank):
    names = "judged", "judged-sharded"
    whole, sharded = (json.loads((runs / name / f"held-{rank}.json").read_text()) for name in names)
    for name in ("layers", "others"):
        assert sharded[name] <= 0.51 * whole[name]


@pytest.mark.usefixtures("said")
def test_answers_are_those_of_a_whole_one(runs):
    one, other = ((runs / name / "predictions.jsonl").read_text() for name in ("judged", "judged-sharded"))
    assert len(one.splitlines()) == 9
    assert one == other


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="FSDP2 before torch 2.13 forgets no passes")
@pytest.mark.usefixtures("said")
def test_passes_without_backward_leave_nothing_behind(runs):
    assert json.loads((runs / "judged-sharded" / "gained-0.json").read_text()) < 20


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_skips_the_step_of_all(runs):
    launch(runs, both("spoilt", "--model.on_nonfinite", "skip", config="spoilt.yaml"))
    assert_same(runs, "spoilt")
    assert metrics(runs / "spoilt", "skipped_steps")[-1] == 1


@pytest.mark.usefixtures("said")
def test_a_checkpoint_of_it_goes_on_with_a_whole_one(runs):
    assert adapter_bytes(runs / "saves") == adapter_bytes(runs / "resumed")


@pytest.mark.slow
def test_whatever_trains_and_however_the_bytes_are_the_same(runs):
    some = {"class_path": "qlora_lightning.ShardedDDPStrategy", "init_args": {"offload": 2}}
    commands = [command for name, more in ALIKE.items() for command in both(name, *more)]
    launch(runs, [*commands, fit("some", *CHECKPOINTING, "--trainer.strategy", json.dumps(some))], timeout=900)
    for name in ALIKE:
        assert_same(runs, name)
        assert_same_updates(runs, name)
    assert_same(runs, "checkpointing", "some")


@pytest.mark.slow
def test_preferences_ask_the_reference_when_some_process_needs_it(runs):
    bases = {base: both(base, "--model.base", base, *PAIRS, config="pairs.yaml") for base in ("untied", "tiny")}
    launch(runs, [command for commands in bases.values() for command in commands])
    for base in bases:
        assert_same(runs, base)


@pytest.mark.slow
def test_three_processes_train_and_resume_as_a_whole_one(runs):
    """From three on shards are of unlike sizes, and a sum depends on its order."""
    three = [*ACCUMULATED, "--trainer.devices", "3"]
    commands = [fit("three", *three, *WHOLE, config="saves.yaml"), fit("three-sharded", *three, *SHARDED)]
    launch(runs, [*commands, fit("three-resumed", *three, *SHARDED, "--ckpt_path", "saved/4.ckpt")], processes=3)
    assert_same(runs, "three")
    assert adapter_bytes(runs / "three") == adapter_bytes(runs / "three-resumed")


@pytest.mark.slow
def test_one_process_streams_layers_from_the_host(runs):
    one = ["--trainer.devices", "1"]
    some = {"class_path": "qlora_lightning.ShardedDDPStrategy", "init_args": {"offload": 2}}
    ways = {"one": "auto", "one-sharded": "ddp_sharded_offload", "one-some": json.dumps(some)}
    launch(runs, [fit(name, *one, "--trainer.strategy", each) for name, each in ways.items()], processes=1)
    assert_same(runs, "one")
    assert_same(runs, "one", "one-some")


def test_a_weight_that_is_read_before_it_is_gathered_says_so(runs):
    callbacks = ["--trainer.callbacks", json.dumps([{"class_path": "hooks.Dequantize"}])]
    command = [sys.executable, "-m", "qlora_lightning", *fit("read", *callbacks, "--trainer.devices", "1", *SHARDED)]
    done = subprocess.run(command, cwd=runs, env=environment(runs), timeout=120, text=True, capture_output=True)
    assert done.returncode == 1
    assert "A weight of the base was read outside the forward and backward of its decoder layer" in done.stderr


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_others(runs):
    config = yaml.safe_load((runs / "spoilt.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "hooks.Spoil", "init_args": {"rank": 1, "raises": True}}]
    (runs / "raises.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "qlora_lightning", *fit("raises", *SHARDED, config="raises.yaml")]
    done = subprocess.run(command, cwd=runs, env=environment(runs), timeout=120, text=True, capture_output=True)
    assert done.returncode == 1
    assert "a bug of the user's" in done.stderr
    assert f"process 1 of 2 (counted from 0) on {socket.gethostname()} ended: ValueError" in done.stdout + done.stderr


@pytest.mark.slow
def test_all_find_one_learning_rate_and_then_train_as_if_they_had_not_searched(runs):
    fits = [["unsearched", "ddp_sharded", ""], ["ddp", "ddp", "search"], ["searched", "ddp_sharded", "search"]]
    fits += [["loaded", "ddp_sharded", "load"]]  # a module that had its model before its Trainer
    launch(runs, fits, script="find_rates.py")
    found = [json.loads((runs / f"{name}-{rank}.json").read_text()) for name in ("ddp", "searched") for rank in (0, 1)]
    assert found == [[found[0][0], []]] * 4  # no file is left
    assert 1e-8 < found[0][0] < 0.1
    assert len({str(adapter_bytes(runs / name)) for name, *_ in fits}) == 1
    assert len({(runs / name / "held-1.json").read_text() for name in ("unsearched", "searched", "loaded")}) == 1


class OfAUser(ShardedDDPStrategy):
    pass


@pytest.mark.parametrize("strategy", [ShardedDDPStrategy, OfAUser])
def test_a_base_in_8_bits_is_refused_by_name(strategy):
    with pytest.raises(UserError, match="int8"):
        check_trainer("32-true", strategy, "int8")


def test_a_negative_number_of_layers_is_no_way_to_say_all():
    with pytest.raises(UserError, match="offload is -1"):
        ShardedDDPStrategy(offload=-1)
