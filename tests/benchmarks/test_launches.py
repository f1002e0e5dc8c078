"""A step on a GPU that is not there: the right device, no waiting, few launches."""

from typing import Any

import pytest
import torch

from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.step.loss import LossSums
from tests.benchmarks import launches

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(torch.version.cuda is None, reason="takes a torch that was built for CUDA"),
]


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


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


def test_a_read_and_a_tensor_on_the_wrong_device_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = QLoRAModule.last_states

    def reads(self, batch):  # type: ignore[no-untyped-def]
        hidden, targets = usual(self, batch)
        return hidden, targets[targets.ne(0).nonzero()[:, 0]]

    def stays(self, batch):  # type: ignore[no-untyped-def]
        hidden, targets = usual(self, batch)
        return hidden + torch.zeros(1, 1, device="cpu"), targets

    for broken in (reads, stays):
        monkeypatch.setattr(QLoRAModule, "last_states", broken)
        with pytest.raises((AssertionError, RuntimeError)):
            launches.count_host_reads()


@pytest.mark.parametrize(
    ("rows", "kernels"),
    [
        (1, ["bitsandbytes.gemm_4bit.default"]),
        (64, ["bitsandbytes.gemm_4bit.default"]),  # which makes it dense itself, if that is quicker on a card
        (65, ["bitsandbytes.dequantize_4bit.default", "aten.mm.default"]),
    ],
)
def test_few_rows_are_multiplied_by_the_packed_weight_itself(rows: int, kernels: list[str]) -> None:
    model, found = launches.make_model(fast=True), launches.Launches()
    with launches.FakeTensorMode(allow_non_fake_inputs=True), launches.pretending(found):
        launches.make_fake(model, "cuda")
        weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
        with found, torch.no_grad():
            states = torch.empty(rows, 256, dtype=torch.bfloat16, device="cuda")
            product = launches.lora.apply_linear(states, None, launches.lora.LinearParts(weight))
    assert product.shape == (rows, 512)
    assert list(found.found.elements()) == kernels
