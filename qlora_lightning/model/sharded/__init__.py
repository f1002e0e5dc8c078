"""A base of which each process holds a shard: the strategy, and what it does to the model.

Outside of this room a pass that not every process runs enters ``collective_passes``, and that is all.
"""

from qlora_lightning.model.sharded.sharded_base import ShardedBase, collective_passes
from qlora_lightning.model.sharded.strategy import ShardedDDPStrategy

__all__ = ["ShardedBase", "ShardedDDPStrategy", "collective_passes"]
