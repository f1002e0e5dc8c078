"""Devices and processes: accelerators and strategies that may train, how long one waits, what is said of a lost one."""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from qlora_lightning.model.guards.checks import check_trainer
from qlora_lightning.support.errors import LostProcess, UserError

TIMEOUT = timedelta(minutes=10)
_SHARDING = {"fsdp": "FSDPStrategy", "deepspeed": "DeepSpeedStrategy", "model_parallel": "ModelParallelStrategy"}
_COPYING = ("ddp_spawn", "ddp_fork", "ddp_notebook")


def set_timeout() -> None:
    """Let ``trainer.strategy: ddp`` give a silent process up after ten minutes; Lightning waits for thirty.

    Another time: ``{class_path: DDPStrategy, init_args: {timeout: "1:00:00"}}``.
    """
    StrategyRegistry.register("ddp", DDPStrategy, "DDP", override=True, start_method="popen", timeout=TIMEOUT)


def check_accelerator(accelerator: Any) -> None:
    """Refuse a GPU that torch does not find, which Lightning words without the setting.

    Raises:
        UserError: There is none.
    """
    cuda, mps = CUDAAccelerator.is_available, MPSAccelerator.is_available
    found = {"gpu": lambda: cuda() or mps(), "cuda": cuda, "mps": mps}.get(str(accelerator))
    if found is not None and not found():
        kind = "GPU" if accelerator == "gpu" else f"{str(accelerator).upper()} device"
        raise UserError(
            f"trainer.accelerator is {accelerator}, but torch finds no {kind} on this machine: leave "
            "trainer.accelerator out, which takes the best device there is, or set it to cpu."
        )


def check_strategy(strategy: Any, quantization: str) -> None:
    """Refuse by name what shards or copies a base, before Lightning asks for packages and devices, or starts processes.

    Args:
        strategy: ``trainer.strategy``, a name or a strategy.
        quantization: How the base is stored.

    Raises:
        UserError: It shards, or starts its processes with copies of the trainer.
    """
    if isinstance(strategy, str) and strategy.startswith(_COPYING):
        raise UserError(
            f"trainer.strategy is {strategy}, which starts processes with copies of a trainer that is made already, by "
            "pickle or fork: neither loaders nor GPUs in use can be handed over so. Use `trainer.strategy: ddp`, which "
            "starts the command once for each device."
        )
    names = [full for name, full in _SHARDING.items() if isinstance(strategy, str) and strategy.startswith(name)]
    check_trainer("32-true", names[0] if names else type(strategy).__name__, quantization)


def find_lost_process(error: BaseException) -> LostProcess | None:
    """Word an error that says that another process of the run is gone or silent; nothing for any other error."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    message = " ".join(str(error).split())
    if not (isinstance(error, distributed.DistError) or "gloo" in message):
        return None
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    return LostProcess(
        f"process {rank} of {world_size} (counted from 0) can no longer reach another one, which was killed (by the "
        "system, for want of memory?), stopped with an error, or hangs; look for its last words above. What was saved "
        f"is whole: `--ckpt_path last` goes on from it. ({message[:200]})"
    )
