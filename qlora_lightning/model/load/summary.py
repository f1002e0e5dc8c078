"""What a fit prints of its model at the start, and the count of its parameters."""

from typing import Any

import bitsandbytes as bnb
from lightning.pytorch.utilities import rank_zero_only
from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_lightning.model.layers.fuse import Fusion, explain_plain_layers
from qlora_lightning.model.load.device import explain_dtype
from qlora_lightning.support.console import say


@rank_zero_only
def describe_fit(module: Any, fusion: Fusion) -> None:
    """Print the dtype of the products where it surprises, what trains, and why layers do not run fused."""
    autocasts, precision = module.autocast_dtype is not None, str(module.trainer.precision)
    for line in (
        explain_dtype(module.compute_dtype, module.device),
        describe_adapter_size(module.model),
        explain_plain_layers(fusion, autocasts=autocasts, precision=precision) if module.fast else None,
    ):
        if line is not None:
            say(line)


def describe_adapter_size(model: nn.Module) -> str:
    """Describe in a line which modules carry an adapter, and how many parameters train."""
    names = [name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    trainable, total = count_parameters(model)
    modules = f"{len(names)} modules ({', '.join(dict.fromkeys(names))})"
    return f"Adapter on {modules}: {trainable:,} of {total:,} parameters train ({trainable / total:.2%})."


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count trainable and all parameters; a packed 4-bit weight counts as the numbers that it stands for."""
    sizes = {parameter: parameter.numel() for parameter in model.parameters()}
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    sizes |= {linear.weight: linear.in_features * linear.out_features for linear in linears}
    return sum(size for each, size in sizes.items() if each.requires_grad), sum(sizes.values())
