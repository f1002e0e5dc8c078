"""What tests on a card share. They take no SmolLM2: a bare machine does not have it."""

import os

import pytest
import torch

from tests import steps
from tests.random_base import save_random_llama, save_tokenizer

# To see whether the tests are sound where there is no card: TEST_DEVICE=cpu pytest -m gpu tests/gpu
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random LLaMA of two layers in bfloat16, so that its quantized weights are the same for every compute dtype."""
    return make_base(tmp_path_factory.mktemp("base"))


def make_base(folder, **sizes):
    texts = [f"Count to {n}. Please. " + " ".join(map(str, range(1, n + 1))) for n in range(1, 25)]
    save_tokenizer(folder, texts, size=512)
    usual = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048}
    save_random_llama(folder, torch.bfloat16, **(usual | sizes))
    return folder


def make_module(base, device=DEVICE, **options):
    return steps.make_module(base, device, **{"cache": False} | options)
