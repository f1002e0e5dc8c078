from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from torch.profiler import DeviceType

from qlora_lightning.commands.profile.attribution import STEP, Attribution
from qlora_lightning.commands.profile.parts import (
    ACTIVATION,
    ADAPTERS,
    ATTENTION,
    BASE,
    DATA,
    DEQUANTIZATION,
    HEAD,
    NORMS,
    OPTIMIZER,
    RECOMPUTATION,
    REST,
    ROTARY,
    Widths,
    name_scope,
)

WIDTHS = Widths(narrow=frozenset({8, 16}), hidden=64, vocabulary=1000)
ENGINE = "autograd::engine::evaluate_function: "


@dataclass
class Event:
    """As torch's profiler gives them; times in microseconds."""

    name: str
    self_cpu_time_total: float
    cpu_children: list["Event"] = field(default_factory=list)
    input_shapes: list[list[int]] = field(default_factory=list)
    sequence_nr: int = -1
    scope: int = 0
    self_device_time_total: float = 0.0
    device_type: DeviceType = DeviceType.CPU
    cpu_parent: "Event | None" = None

    time_range = SimpleNamespace(start=0.0)

    def __post_init__(self):
        for child in self.cpu_children:
            child.cpu_parent = self

    @property
    def cpu_time_total(self):
        return self.self_cpu_time_total + sum(child.cpu_time_total for child in self.cpu_children)

    def all(self):
        return [self, *(event for child in self.cpu_children for event in child.all())]


def product(time, *shapes, **settings):
    return Event("aten::mm", time, input_shapes=[list(shape) for shape in shapes], **settings)


def share_out(*children, own=0.0, **settings):
    """Give microseconds of each part in a step of these events."""
    found = Attribution(WIDTHS, **settings)
    found.add(Event(STEP, own, list(children)).all())
    return {part: pytest.approx(1e6 * share.seconds) for part, share in found.shares.items() if share.seconds}


def test_all_of_a_step_is_shared_out():
    norm = Event(
        "NormedLinears",
        1,
        [
            Event("aten::mul_", 2, input_shapes=[[30, 64], [64]]),
            product(4, (30, 64), (64, 16)),
            Event("bitsandbytes::dequantize_4bit", 8, [Event("aten::empty", 16)]),
            product(32, (30, 64), (64, 128), sequence_nr=1),
        ],
    )
    loss = Event("_FrozenHeadLoss", 64, [product(128, (30, 64), (64, 1000)), Event("aten::_softmax", 256)])
    step = Event(name_scope(OPTIMIZER, whole=False), 512, [norm, loss])
    waiting = Event(name_scope(DATA, whole=True), 1024)
    assert share_out(step, waiting, own=2048) == {
        NORMS: 3,
        ADAPTERS: 4,
        DEQUANTIZATION: 24,
        BASE: 32,
        HEAD: 448,
        OPTIMIZER: 512,
        DATA: 1024,
        REST: 2048,
    }


def test_backward_belongs_to_the_part_of_its_forward():
    rotary = Event(name_scope(ROTARY, whole=False), 0, [Event("aten::mul", 1, sequence_nr=5)])
    backward = Event(
        f"{ENGINE}MulBackward0",
        2,
        [Event("MulBackward0", 4, [Event("aten::mul", 8)], sequence_nr=5, scope=1)],
        sequence_nr=5,
    )
    of_attention = Event(f"{ENGINE}SampleAttentionBackward", 16, [Event("SampleAttentionBackward", 32, scope=1)])
    assert share_out(rotary, backward, of_attention) == {ROTARY: 15, ATTENTION: 48}


def test_of_the_operators_with_a_number_the_last_made_the_node():
    forward = Event(name_scope(NORMS, whole=False), 0, [Event("aten::mul", 1, sequence_nr=7)], sequence_nr=7)
    viewed = Event(name_scope(ROTARY, whole=False), 0, [Event("aten::neg", 2, sequence_nr=7)])
    backward = Event(f"{ENGINE}NegBackward0", 4, sequence_nr=7)
    assert share_out(forward, viewed, backward) == {NORMS: 1, ROTARY: 6}


def test_forward_that_runs_again_in_backward_is_recomputation():
    again = [
        Event("NormedLinears", 1, [product(2, (30, 64), (64, 128))], sequence_nr=9),
        Event(name_scope(ACTIVATION, whole=False), 4, [Event("aten::silu", 8)]),
    ]
    inner = Event("SwiGLUProjectionBackward", 16, [*again, Event("aten::silu_backward", 32)], scope=1, sequence_nr=3)
    backward = Event(f"{ENGINE}SwiGLUProjectionBackward", 64, [inner], sequence_nr=3)
    # Its nodes have backwards of their own, which are not recomputation.
    own = Event(f"{ENGINE}NormedLinearsBackward", 128, sequence_nr=9)
    assert share_out(backward, own) == {RECOMPUTATION: 15, ACTIVATION: 112, NORMS: 128}


def test_calls_are_entries_into_a_part():
    found = Attribution(WIDTHS)
    twice = [product(1, (30, 64), (64, 128)), product(1, (30, 64), (64, 128))]
    found.add(Event(STEP, 0, [Event("NormedLinears", 1, [Event("aten::mul", 1), *twice])]).all())
    assert (found.shares[NORMS].calls, found.shares[BASE].calls) == (1, 2)


def test_logits_are_those_of_the_largest_chunk():
    found = Attribution(WIDTHS)
    chunks = [product(1, (rows, 1000), (1000, 64)) for rows in (20, 50, 10)]
    found.add(Event(STEP, 0, [Event("_FrozenHeadLoss", 1, chunks)]).all())
    assert found.logit_rows == 50


def test_on_cuda_kernels_count_and_the_rest_is_when_none_runs():
    forward = Event("NormedLinears", 10, [product(10, (30, 64), (64, 128), self_device_time_total=40)])
    forward.self_device_time_total = 5
    waiting = Event(name_scope(DATA, whole=True), 30)
    found = Attribution(WIDTHS, on_cuda=True)
    step = Event(STEP, 50, [waiting, forward])
    backward = Event(f"{ENGINE}RotaryBackward", 7, self_device_time_total=3)  # in a thread of its own
    kernel = Event("ampere_gemm", 0, self_device_time_total=40, device_type=DeviceType.CUDA)
    found.add([*step.all(), *backward.all(), kernel])
    expected = {NORMS: 5, BASE: 40, DATA: 30, ROTARY: 3, REST: 100 - 78}
    assert {part: 1e6 * share.seconds for part, share in found.shares.items()} == pytest.approx(expected)
