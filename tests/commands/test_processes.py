from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from qlora_lightning.commands.processes import TIMEOUT, check_strategy, find_lost_process, set_timeout
from qlora_lightning.support.errors import UserError


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("fsdp", "FSDP"), ("fsdp_cpu_offload", "FSDP"), ("deepspeed_stage_2", "DeepSpeed"), ("model_parallel", "Model")],
)
def test_strategies_that_shard_the_base_are_refused_by_name(name, strategy):
    with pytest.raises(UserError, match=rf"trainer.strategy is {strategy}\w+, which shards.*nf4.*ddp"):
        check_strategy(name, "nf4")


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_spawn_find_unused_parameters_true"])
def test_strategies_that_copy_a_trainer_into_their_processes_are_refused(name):
    with pytest.raises(UserError, match=rf"trainer.strategy is {name}, .*Use `trainer.strategy: ddp`"):
        check_strategy(name, "nf4")


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true", "auto", DDPStrategy()])
def test_other_strategies_pass(strategy):
    check_strategy(strategy, "nf4")


def test_ddp_by_name_waits_ten_minutes(monkeypatch):
    monkeypatch.setattr(StrategyRegistry, "register", register := Register())
    set_timeout()
    assert register.asked == ("ddp", DDPStrategy, {"override": True, "start_method": "popen", "timeout": TIMEOUT})
    assert timedelta(minutes=10) == TIMEOUT


class Register:
    def __call__(self, name, strategy, description, **options):
        self.asked = (name, strategy, options)


def test_only_errors_of_the_exchange_are_a_lost_process(monkeypatch):
    lost = RuntimeError("[pytorch/third_party/gloo/transport] Connection closed by peer [127.0.0.1]:39149.")
    assert find_lost_process(lost) is None  # one process cannot lose another
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert "process 2 of 4 (counted from 0) can no longer reach another one" in str(find_lost_process(lost))
    assert find_lost_process(torch.distributed.DistBackendError("NCCL timed out")) is not None
    assert find_lost_process(RuntimeError("shapes do not fit")) is None
