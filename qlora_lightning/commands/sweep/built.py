"""Whether the adapter that was built is the one that a trial asks for: a ``build_model`` may ignore the setting."""

from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from qlora_lightning.commands.sweep.dimensions import Dimension, show_value
from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.adapters.targets import select_targets
from qlora_lightning.support.errors import UserError


def check_built(module: Any, dimension: Dimension, value: Any) -> None:
    """Refuse to train an adapter that is not the trial's: trials would be one training under several names.

    Args:
        module: With its model.
        dimension: What the sweep varies.
        value: Of this trial.

    Raises:
        UserError: Rank or modules are others than asked for.
    """
    model = module.model
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    adapted = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    if dimension.setting == "rank":
        ranks = {layer.r.get(ADAPTER) for layer in adapted.values()}
        if value not in ranks:  # rank_pattern may give some modules another one
            found = " and ".join(str(rank) for rank in sorted(rank for rank in ranks if rank)) or "none"
            raise _ignored(module, dimension, value, f"rank {found}")
    if dimension.setting == "target_modules":
        inside = tuple(f"{name}." for name in adapted)
        linears = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)]
        candidates = [*adapted, *(name for name in linears if not name.startswith(inside))]
        for other in dimension.values:  # a misspelt one is told before the first trial, not after it
            select_targets(candidates, other, module.adapter_options["layers"])
        if set(select_targets(candidates, value, module.adapter_options["layers"])) != set(adapted):
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in adapted})) or "no module"
            raise _ignored(module, dimension, value, f"adapters on {kinds}")


def _ignored(module: nn.Module, dimension: Dimension, value: Any, found: str) -> UserError:
    return UserError(
        f"A trial of model.{dimension.setting} {show_value(value)} would train {found}: build_model of "
        f"{type(module).__name__}, or model.lora_options, does not heed self.adapter_options[{dimension.setting!r}]."
    )
