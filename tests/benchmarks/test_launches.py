"""A step on a GPU that is not there: the right device, no waiting, few launches."""

from typing import Any

import pytest
import torch

from qlora_lightning import LossSums, QLoRAModule
from tests.benchmarks import launches

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(torch.version.cuda is None, reason="takes a torch that was built for CUDA"),
]


def test_a_layer_asks_for_few_launches_and_all_of_it_is_on_the_device() -> None:
    forward, backward = launches.count(fast=True)
    assert forward.by_layer() <= 40
    assert backward.by_layer() <= 55


def test_the_host_waits_once_a_step_whatever_is_logged() -> None:
    class Logs(QLoRAModule):
        def compute_loss(self, batch: dict[str, Any]) -> LossSums:
            sums = super().compute_loss(batch)
            return sums._replace(logged={"nll": sums.nll_sum, "tokens": sums.labelled_tokens})

    assert launches.count_host_reads() == launches.count_host_reads(Logs) == 1
