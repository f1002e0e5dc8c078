"""What a fit prints of its model at the start."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from qlora_lightning.model.adapters.summary import describe_sizes
from qlora_lightning.model.layers.fuse import Fusion, explain_plain_layers
from qlora_lightning.model.load.device import explain_dtype
from qlora_lightning.support.console import say


@rank_zero_only
def describe_fit(module: Any, fusion: Fusion) -> None:
    """Print the dtype of the products where it surprises, what trains, and why layers do not run fused."""
    autocasts, precision = module.autocast_dtype is not None, str(module.trainer.precision)
    for line in (
        explain_dtype(module.compute_dtype, module.device),
        describe_sizes(module.model),
        explain_plain_layers(fusion, autocasts=autocasts, precision=precision) if module.fast else None,
    ):
        if line is not None:
            say(line)
