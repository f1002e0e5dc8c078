"""DDP over a sharded base, for ``trainer.strategy: ddp_sharded`` and ``ddp_sharded_offload``."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from qlora_lightning.model.sharded.sharded_base import ShardedBase

SHARDED_STRATEGIES = {"ddp_sharded": False, "ddp_sharded_offload": True}  # names, and whether all shards are offloaded


class ShardedDDPStrategy(DDPStrategy):
    """DDP of the adapters over a base of which each process holds a shard: what one device cannot hold.

    Results, checkpoints and adapter folders are those of ``ddp``. The module's ``sharded_base`` is what the base has
    become: see :class:`~qlora_lightning.model.sharded.sharded_base.ShardedBase`.

    Args:
        offload: Keep the shards in the machine's memory, and copy each layer to the device when it is used: ``True``
            all of them, a number those of the first layers. One process alone may do so too.
        timeout: After which a process that is silent is given up.
        kwargs: More arguments of ``DDPStrategy``.
    """

    def __init__(
        self, *, offload: bool | int = False, timeout: timedelta | None = timedelta(minutes=10), **kwargs: Any
    ) -> None:
        super().__init__(timeout=timeout, **kwargs)
        self.offload = offload
        self._silence_limit = timeout

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard the base as soon as ``configure_model``, which runs inside, has loaded it on the CPU."""
        yield
        module: Any = self.lightning_module
        if module.sharded_base is not None:
            return
        group = torch.distributed.new_group(timeout=self._silence_limit)  # gives a silent process up as DDP's does
        module.sharded_base = ShardedBase(module.causal_lm, group, self.root_device, self.offload)
        module.to(self.root_device)
        module.sharded_base.start()


def register_strategies() -> None:
    """Let Lightning's Trainer know the sharded strategies by their names; the command line does so."""
    for name, offload in SHARDED_STRATEGIES.items():
        StrategyRegistry.register(name, ShardedDDPStrategy, "DDP, the base sharded", override=True, offload=offload)
