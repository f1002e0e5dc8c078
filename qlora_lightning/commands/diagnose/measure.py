"""Measures every module that an adapter moves."""

from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from qlora_lightning.model.opened_adapter import find_adapter
from qlora_lightning.model.weights.base import OriginalWeights, TrainedWeights
from qlora_lightning.model.weights.merging import Movement, adapted_layers, measure_movement, plan_merge
from qlora_lightning.support.errors import UserError


class Diagnosis(NamedTuple):
    """An adapter folder, its base, and what was measured of each module, in the model's order."""

    adapter: str
    base: str
    movements: list[Movement]


def measure_adapter(folder: str, base: str | None) -> Diagnosis:
    """Measure an adapter folder.

    Args:
        folder: The adapter folder.
        base: Another name of its base.

    Raises:
        UserError: The adapter or the base cannot be used, or the adapter has no LoRA in it.
    """
    source = find_adapter(folder, base)
    plan = plan_merge(source.base.folder, source.folder)
    layers = adapted_layers(plan)
    if not layers:
        raise UserError(f"The adapter folder {source.folder} has no LoRA in it: there is nothing to measure.")
    # quantization changes a weight's norm by less than 1 %: what is stored will do, and is quicker
    weights = (
        TrainedWeights(source.base, source.quantization or "nf4", source.double_quant, source.compute_dtype)
        if source.is_stored_quantized
        else OriginalWeights(source.base)
    )
    console = Console(stderr=True)
    steps = track(layers.items(), "measuring", console=console, transient=True, disable=not console.is_terminal)
    movements = [measure_movement(layer, name, weights) for name, layer in steps]
    return Diagnosis(str(source.folder), source.identity.get("base", source.base.name), movements)
