"""LoRA+: B learns faster than A, by parameter groups."""

from collections.abc import Mapping

from torch import nn

from qlora_lightning.errors import UserError
from qlora_lightning.model.optimization.optimizer import ParameterGroups

_EMBEDDING_RATE = 1e-6  # PEFT's: an adapter on an embedding learns at this rate, whatever the others do


def check_loraplus_ratio(ratio: float | None) -> None:
    """Refuse a ratio that would make B the slower one.

    Raises:
        UserError: It is less than 1.
    """
    if ratio is not None and not 1 <= ratio < float("inf"):
        raise UserError(f"model.loraplus_ratio is {ratio:g}: expected 1 or more, such as 16, or null.")


def group_parameters(
    trainable: Mapping[str, nn.Parameter], learning_rate: float, ratio: float | None
) -> ParameterGroups:
    """Give all that trains in one group, or, with a ratio, as ``peft.optimizers.create_loraplus_optimizer`` does.

    Hayou et al. 2024 (LoRA+): with the same rate A and B of wide layers do not both learn efficiently. B, and whatever
    has one dimension, takes ``ratio`` times the learning rate; biases have no weight decay.

    Args:
        trainable: The tensors that train, by name.
        learning_rate: Of A.
        ratio: Learning rate of B over that of A.
    """
    if ratio is None:
        return [{"params": list(trainable.values())}]
    kinds = {name: _kind(name, parameter) for name, parameter in trainable.items()}
    options = {
        "a": {"lr": learning_rate},
        "embedding": {"lr": _EMBEDDING_RATE},
        "b": {"lr": learning_rate * ratio},
        "bias": {"lr": learning_rate * ratio, "weight_decay": 0.0},
    }
    groups = [
        {"params": [parameter for name, parameter in trainable.items() if kinds[name] == kind], **chosen}
        for kind, chosen in options.items()
    ]
    return [group for group in groups if group["params"]]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if ".lora_embedding_" in name:
        return "embedding"
    if ".lora_B." in name or parameter.ndim == 1:
        return "bias" if "bias" in name else "b"
    return "a"
