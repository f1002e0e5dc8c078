"""A step sends the gradients of the adapters once, and a sharded base once in each direction; nothing else of size."""

import json

import pytest
import yaml

from tests.benchmarks.communication import adapter_bytes, layer_bytes
from tests.distributed.runs import CONFIG, launch


@pytest.fixture(scope="module")
def sent(folder):
    """How many bytes each strategy sent in a step."""
    for strategy in ("ddp", "ddp_sharded"):
        callback = {"class_path": "traffic.Traffic", "init_args": {"file": f"{strategy}.json"}}
        trainer = {**CONFIG["trainer"], "strategy": strategy, "callbacks": [callback]}
        config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 2}, "trainer": trainer, "evaluation": None}
        (folder / f"{strategy}.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config"]
    launch(folder, [[*fit, f"{name}.yaml", f"--trainer.default_root_dir={name}"] for name in ("ddp", "ddp_sharded")])
    return {name: json.loads((folder / f"{name}.json").read_text())["sent"] for name in ("ddp", "ddp_sharded")}


def test_a_step_sends_gradients_once_and_a_sharded_base_once_in_each_direction(folder, sent):
    shape = json.loads((folder / "tiny" / "config.json").read_text())
    gradients = adapter_bytes(shape, rank=2)
    assert gradients <= sent["ddp"] < 1.5 * gradients  # 2 (N - 1) / N = 1; messages have heads
    assert shape["tie_word_embeddings"]  # one tensor, which stays whole
    gathered = 2 * shape["num_hidden_layers"] * layer_bytes(shape, dtype_size=4) // 2
    assert gathered + gradients <= sent["ddp_sharded"] < 1.1 * (gathered + gradients)
