import time

import torch
from torch import nn

from qlora_lightning.commands.profile import memory
from qlora_lightning.commands.profile.memory import count_bytes, read_base, tensors_of_optimizer


def test_base_is_what_is_frozen():
    model = nn.ModuleList([nn.Linear(3, 5, bias=False), nn.Linear(3, 7, bias=False, dtype=torch.bfloat16)])
    model[1].requires_grad_(False)
    assert read_base(model) == {"bfloat16": 3 * 7 * 2}


def test_the_optimizers_state_is_counted():
    parameter = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.AdamW([parameter])
    assert count_bytes(tensors_of_optimizer(optimizer)) == 0
    parameter.grad = torch.ones(10)
    optimizer.step()
    assert count_bytes(tensors_of_optimizer(optimizer)) == 2 * 10 * 4 + 4  # and the number of steps
    assert count_bytes([parameter.grad, None]) == 40


def test_a_peak_that_has_passed_is_seen(monkeypatch):
    readings = iter([1.0, 3.0])
    monkeypatch.setattr(memory, "read_memory", lambda device: {"private_memory_gib": next(readings, 2.0)})
    watch = memory.PeakWatch(torch.device("cpu"))
    assert watch.stop() == {}
    watch.start()
    time.sleep(0.3)
    assert watch.stop() == {"private memory before the step": 1 * 2**30, "peak private memory": 3 * 2**30}
