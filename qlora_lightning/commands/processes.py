"""Several processes: strategies that cannot work, the time to wait for a silent one, the report of a lost one."""

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from qlora_lightning.support.errors import LostProcess, UserError

TIMEOUT = timedelta(minutes=10)


def set_timeout() -> None:
    """Let ``trainer.strategy: ddp`` give a silent process up after ten minutes; Lightning waits for thirty.

    Another time: ``{class_path: DDPStrategy, init_args: {timeout: "1:00:00"}}``.
    """
    StrategyRegistry.register("ddp", DDPStrategy, "DDP", override=True, start_method="popen", timeout=TIMEOUT)


def check_strategy(strategy: Any) -> None:
    """Reject a ``trainer.strategy`` that starts its processes with copies of the trainer.

    Raises:
        UserError: it does.
    """
    if isinstance(strategy, str) and strategy.startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise UserError(
            f"trainer.strategy is {strategy}, which copies a trainer into its processes by pickle or fork: loaders and "
            "GPUs in use cannot be copied. Use `trainer.strategy: ddp`, which starts the command once for each device."
        )


def find_lost_process(error: BaseException) -> LostProcess | None:
    """Return the error to report if another process of the run is gone or silent; None for any other error."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    message = " ".join(str(error).split())
    if not (isinstance(error, distributed.DistError) or "gloo" in message):
        return None
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    return LostProcess(
        f"process {rank} of {world_size} (counted from 0) can no longer reach another one, which was killed (by the "
        "system, for want of memory?), stopped with an error, or hangs; see its last lines above. What was saved is "
        f"whole: resume from it by `--ckpt_path last`. ({message[:200]})"
    )
