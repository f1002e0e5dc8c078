"""A sharded base on a card: from the host, layer by layer; and two processes on one card, which talk by gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule, ShardedDDPStrategy
from tests.equality import adapter_bytes, same
from tests.gpu.conftest import DEVICE, make_base
from tests.steps import make_trainer

ACCELERATOR = "gpu" if DEVICE.type == "cuda" else "cpu"


@pytest.fixture
def untied(tmp_path):
    (tmp_path / "untied").mkdir()
    return make_base(tmp_path / "untied", tie_word_embeddings=False, num_hidden_layers=4)


@pytest.mark.parametrize("offload", [False, True, 2])
def test_one_process_trains_the_same_from_the_host(untied, rows_file, tmp_path, offload):
    ends = []
    for strategy in ("auto", ShardedDDPStrategy(offload=offload)):
        torch.manual_seed(7)
        data = InstructionDataModule(train=str(rows_file), val=str(rows_file), batch_size=2, tokenizer=str(untied))
        trainer = make_trainer(tmp_path, accelerator=ACCELERATOR, deterministic=True, strategy=strategy, max_steps=6)
        module = QLoRAModule(str(untied), rank=4, compute_dtype="bf16")
        trainer.fit(module, data)
        ends.append({name: tensor.cpu() for name, tensor in module.state_dict().items()})
    torch.distributed.destroy_process_group()
    assert same(*ends)


def test_two_processes_on_one_card_train_as_with_a_base_each(untied, rows_file, tmp_path):
    """To Lightning they are two machines of one card each: it takes a card only once on each."""
    kinds = {"whole": "lightning.pytorch.strategies.DDPStrategy", "sharded": "qlora_lightning.ShardedDDPStrategy"}
    for port, (name, kind) in enumerate(kinds.items(), start=29_610):
        strategy = {"class_path": kind, "init_args": {"process_group_backend": "gloo"}}
        settings = {
            "model.base": untied,
            "data.train": rows_file,
            "data.batch_size": 2,
            "trainer.accelerator": ACCELERATOR,
            "trainer.devices": 1,
            "trainer.num_nodes": 2,
            "trainer.strategy": json.dumps(strategy),
            "trainer.max_steps": 3,
            "trainer.default_root_dir": tmp_path / name,
        }
        options = [f"--{key}={each}" for key, each in settings.items()]
        command = [sys.executable, "-m", "qlora_lightning", "fit", *options]
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        nodes = [subprocess.Popen(command, env={**shared, "NODE_RANK": str(rank)}) for rank in (0, 1)]
        assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "sharded")
