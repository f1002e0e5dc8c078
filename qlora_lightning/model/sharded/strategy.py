"""DDP over a sharded base, for ``trainer.strategy: ddp_sharded`` and ``ddp_sharded_offload``."""

import re
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from qlora_lightning.support.errors import NOT_GATHERED, UserError

SHARDED_STRATEGIES = {"ddp_sharded": False, "ddp_sharded_offload": True}  # names, and whether all shards are offloaded
_READ_SHARD = re.compile("got mixed torch.Tensor and DTensor|object of type DTensor|'DTensor' object has no attribute")


class ShardedDDPStrategy(DDPStrategy):
    """DDP of the adapters over a base of which each process holds a shard: what one device cannot hold.

    See :mod:`qlora_lightning.model.sharded.sharded_base`. Results, checkpoints, adapter folders are those of ``ddp``.

    Args:
        offload: Keep the shards in the machine's memory, and copy each layer to the device when it is used: ``True``
            all of them, a number those of the first layers. One process alone may do so too.
        timeout: After which a process that is silent is given up.
        kwargs: More arguments of ``DDPStrategy``.

    Raises:
        UserError: ``offload`` is negative.
    """

    def __init__(
        self, *, offload: bool | int = False, timeout: timedelta | None = timedelta(minutes=10), **kwargs: Any
    ) -> None:
        super().__init__(timeout=timeout, **kwargs)
        if offload < 0:
            raise UserError(f"offload is {offload}: expected how many first layers, or true for all.")
        self.offload = offload

    def new_group(self) -> torch.distributed.ProcessGroup:
        """Make another group of all processes, which gives a silent one up as soon as the usual group does."""
        group: torch.distributed.ProcessGroup = torch.distributed.new_group(timeout=self._timeout)
        return group

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if _READ_SHARD.search(str(exception)):
            exception.args = (f"{NOT_GATHERED} ({exception})",)


for name, offloads in SHARDED_STRATEGIES.items():
    StrategyRegistry.register(name, ShardedDDPStrategy, "DDP, the base sharded", override=True, offload=offloads)
