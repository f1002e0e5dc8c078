"""A step sends the gradients of the adapters once, and a sharded base once in each direction; nothing else of size."""

import json

import pytest
import yaml

from tests.benchmarks.communication import adapter_bytes, layer_bytes
from tests.distributed.runs import CONFIG, launch

SMALL = 16  # bytes: sums, and what the processes agree on


@pytest.fixture(scope="module")
def found(folder):
    """What each strategy sent in a step, and the base's config."""
    commands = []
    for strategy in ("ddp", "ddp_sharded"):
        callback = {"class_path": "traffic.Traffic", "init_args": {"file": f"{strategy}.json"}}
        trainer = {**CONFIG["trainer"], "strategy": strategy, "callbacks": [callback]}
        config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 2}, "trainer": trainer, "evaluation": None}
        (folder / f"{strategy}.yaml").write_text(yaml.safe_dump(config))
        commands.append(["fit", "--config", f"{strategy}.yaml", "--trainer.default_root_dir", f"traffic/{strategy}"])
    launch(folder, commands)
    files = {name: folder / f"{name}.json" for name in ("ddp", "ddp_sharded")}
    files["shape"] = folder / "tiny" / "config.json"
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def large(found, strategy):
    return sorted((name, size) for name, size in found[strategy]["collectives"] if size > SMALL)


def test_ddp_sends_the_adapters_gradients_and_nothing_else(found):
    gradients = adapter_bytes(found["shape"], rank=2)
    assert large(found, "ddp") == [("all_reduce", gradients)]
    assert gradients <= found["ddp"]["sent"] < 1.5 * gradients  # 2 (N - 1) / N = 1; messages have heads


def test_a_sharded_base_is_gathered_once_in_each_direction(found):
    shape = found["shape"]
    assert shape["tie_word_embeddings"]  # one tensor, which stays whole
    gathered = [("all_gather", layer_bytes(shape, dtype_size=4) // 2)] * 2 * shape["num_hidden_layers"]
    expected = sorted([*gathered, ("all_reduce", adapter_bytes(shape, rank=2))])
    assert large(found, "ddp_sharded") == expected
    total = sum(size for _, size in expected)
    assert total <= found["ddp_sharded"]["sent"] < 1.1 * total
