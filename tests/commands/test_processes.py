from datetime import timedelta

import torch
from lightning.pytorch.strategies import StrategyRegistry

from qlora_lightning.commands.processes import find_lost_process, set_timeout


def test_ddp_by_name_waits_ten_minutes():
    set_timeout()
    assert StrategyRegistry["ddp"]["init_params"]["timeout"] == timedelta(minutes=10)


def test_only_errors_of_the_exchange_are_a_lost_process(monkeypatch):
    lost = RuntimeError("[pytorch/third_party/gloo/transport] Connection closed by peer [127.0.0.1]:39149.")
    assert find_lost_process(lost) is None  # one process cannot lose another
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert "process 2 of 4 (counted from 0) can no longer reach another one" in str(find_lost_process(lost))
    assert find_lost_process(torch.distributed.DistBackendError("NCCL timed out")) is not None
    assert find_lost_process(RuntimeError("shapes do not fit")) is None
