import random

import numpy as np
import pytest
import torch

from qlora_lightning.model.checkpoint.ranks import capture_generators, restore_generators


def draw():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


def test_every_generator_goes_on_where_it_was_captured():
    draw()  # gauss and randn draw pairs: half of one is kept, and must be restored too
    state = capture_generators()
    expected = draw()
    draw()
    restore_generators(state)
    assert draw() == expected


def test_the_state_survives_a_safe_load_from_a_file(tmp_path):
    draw()
    torch.save(capture_generators(), tmp_path / "state")
    expected = draw()
    restore_generators(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


def test_capturing_draws_nothing():
    state = capture_generators()
    first = draw()
    restore_generators(state)
    capture_generators()
    assert draw() == first


@pytest.mark.gpu
def test_the_generator_of_the_gpu_goes_on_too():
    state = capture_generators()
    expected = torch.randn(3, device="cuda")
    restore_generators(state)
    assert torch.equal(torch.randn(3, device="cuda"), expected)
