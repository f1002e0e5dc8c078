"""A sharded base on a card: from the host, layer by layer."""

import pytest
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule, ShardedDDPStrategy
from tests.equality import same
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
