"""What tests on a card share. They take no SmolLM2: a bare machine does not have it."""

import json
import os

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from tests import steps
from tests.random_base import save_random_llama, save_tokenizer

# To see whether the tests are sound where there is no card: TEST_DEVICE=cpu pytest -m gpu tests/gpu
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
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
    return steps.make_module(base, device, **{"cache": False} | options)
