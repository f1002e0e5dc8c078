"""What tests on a card share. They take no SmolLM2: a bare machine does not have it."""

import json
import os

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from qlora_lightning import QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from tests.flat_batch import make_flat_batch, to_device
from tests.random_base import save_random_llama, save_tokenizer

# To see whether the tests are sound where there is no card: TEST_DEVICE=cpu pytest -m gpu tests/gpu
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
LENGTHS = (9, 1, 30, 17, 64, 5)
ROWS = [
    {"instruction": f"Count to {n}." + " Please." * (n % 4), "output": " ".join(str(i) for i in range(1, n + 1))}
    for n in range(1, 25)
]


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random LLaMA of two layers in bfloat16, so that its quantized weights are the same for every compute dtype."""
    return make_base(tmp_path_factory.mktemp("base"))


def make_base(folder, **sizes):
    save_tokenizer(folder, [" ".join(row.values()) for row in ROWS], size=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    usual = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **(usual | sizes),
    )
    save_random_llama(folder, config)
    return folder


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def make_module(base, device=DEVICE, **options):
    """A module whose adapters are random, not zero, and the same in each."""
    module = QLoRAModule(str(base), **{"rank": 4, "compute_dtype": "fp32", "cache": False} | options).to(device)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trainable_tensors(module).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return module


def make_batch(lengths=LENGTHS, seed=1):
    return make_flat_batch(lengths, seed, vocabulary=250)


def loss_and_gradients(module, batch=None):
    """The mean loss, and all gradients of A and B in one vector on the CPU."""
    sums = module.compute_loss(to_device(make_batch() if batch is None else batch, module.device))
    (sums.nll_sum * module.loss_scale).backward()
    trainable = trainable_tensors(module).values()
    gradients = torch.cat([tensor.grad.flatten().cpu() for tensor in trainable]) / module.loss_scale
    for tensor in trainable:
        tensor.grad = None
    return float(sums.nll_sum.detach() / sums.labelled_tokens), gradients


def distance(one, other):
    return float((one - other).norm() / other.norm())
