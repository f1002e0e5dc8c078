import copy

import pytest

from qlora_lightning.commands.short_forms import CALLBACK_KEYS, expand_arguments, expand_config, shorten_config

DEFAULTS = {"model": "qlora_lightning.QLoRAModule", "data": "qlora_lightning.InstructionDataModule"}


@pytest.mark.parametrize("config", [None, 3, "text", ["a"], {}, {"model": {"rank": 8}}, {"gpu_memory": {}}])
def test_what_needs_no_expansion_is_left_alone(config):
    assert expand_config(copy.deepcopy(config)) == config


@pytest.mark.parametrize("key", ["model", "data"])
def test_keys_beside_a_class_path_become_its_arguments(key):
    config = {key: {"class_path": "mine.Class", "rank": 3, "init_args": {"alpha": 4, "extra": 1}}}
    assert expand_config(config) == {
        key: {"class_path": "mine.Class", "init_args": {"rank": 3, "alpha": 4, "extra": 1}}
    }


def test_a_class_path_alone_stays_alone():
    assert expand_config({"model": {"class_path": "mine.Class"}}) == {"model": {"class_path": "mine.Class"}}


@pytest.mark.parametrize("key", CALLBACK_KEYS)
@pytest.mark.parametrize(("value", "enabled"), [(None, False), (False, False), (True, True)])
def test_null_and_false_switch_a_callback_off(key, value, enabled):
    assert expand_config({key: value}) == {key: {"enabled": enabled}}


@pytest.mark.parametrize(
    ("arguments", "expanded"),
    [
        (["--gpu_memory", "null"], ["--gpu_memory.enabled=false"]),
        (["--gpu_memory=null"], ["--gpu_memory.enabled=false"]),
        (["--throughput", "False"], ["--throughput.enabled=false"]),
        (["--gradient_checkpointing", "true"], ["--gradient_checkpointing.enabled=true"]),
        (["--gpu_memory", '{"enabled": false}'], ['--gpu_memory={"enabled": false}']),
        (["--gpu_memory.enabled", "false"], ["--gpu_memory.enabled", "false"]),
        (["--gpu_memory"], ["--gpu_memory"]),
        (["fit", "--config", "c.yaml", "--model.rank=8"], ["fit", "--config", "c.yaml", "--model.rank=8"]),
        (["--data.system", "a=b", "null"], ["--data.system", "a=b", "null"]),
        ([], []),
    ],
)
def test_callbacks_are_switched_on_the_command_line(arguments, expanded):
    before = list(arguments)
    assert expand_arguments(arguments) == expanded
    assert arguments == before


def test_the_saved_config_is_flat_and_names_only_other_classes():
    config = {
        "seed_everything": 1,
        "model": {"class_path": DEFAULTS["model"], "init_args": {"base": "b", "rank": 8}},
        "data": {"class_path": "mine.Data", "init_args": {"train": "t"}},
    }
    before = copy.deepcopy(config)
    short = shorten_config(config, DEFAULTS)
    assert short == {
        "seed_everything": 1,
        "model": {"base": "b", "rank": 8},
        "data": {"class_path": "mine.Data", "train": "t"},
    }
    assert config == before
    assert expand_config(short)["data"] == before["data"]


def test_a_config_without_model_or_data_can_be_shortened():
    assert shorten_config({"model": {"class_path": DEFAULTS["model"]}, "data": None}, DEFAULTS) == {
        "model": {},
        "data": {},
    }
