"""Notices adapters that stay as they are although the learning rate would move them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

STEPS = 10  # optimizer steps between two looks
_SHARE = 0.01  # of the peak learning rate: below it a step may be too small for float32, as at a schedule's end


class AdapterMovement:
    """Compares every A and B with itself some optimizer steps ago.

    Zero gradients are another check. This one finds tensors that the optimizer was never given, an optimizer that
    steps over them, and learning rates too small for float32. Only steps count whose learning rate is at least 1 % of
    the peak: the first step of a warmup and the last ones of a decay move nothing, rightly.
    """

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._steps = 0

    def check(self, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
        """Count one optimizer step that is about to move the adapters, and look every so many.

        Args:
            trainable: The tensors that train, by name.
            optimizer: What moves them.

        Returns:
            Whether it looked.

        Raises:
            RuntimeError: A tensor is what it was.
        """
        moving = _moved_by(trainable, optimizer)
        if not any(moving.values()):
            return False
        looks = self._steps % STEPS == 0
        if looks:
            now = _checksums(trainable)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            still = [name for name in now if self._before.get(name) == now[name]]
            still = [name for name in still if moving[name] or id(trainable[name]) not in held]
            if still:
                raise RuntimeError(
                    f"{len(still)} of {len(trainable)} adapter tensors are bit for bit what they were {STEPS} steps "
                    f"ago, as {', '.join(still[:3])}. {self._reason(still, trainable, held)}"
                )
            self._before = now
        self._steps += 1
        return looks

    @staticmethod
    def _reason(still: list[str], trainable: Mapping[str, nn.Parameter], held: set[int]) -> str:
        if any(id(trainable[name]) not in held for name in still):
            return "They are in none of the optimizer's groups: let `parameter_groups` return every trainable tensor."
        return "The optimizer leaves them out, or model.learning_rate is too small to change a float32."


def _moved_by(trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    """Whether the optimizer's learning rate of each tensor is large enough now; not of those that it does not hold."""
    enough: set[int] = set()
    for group in optimizer.param_groups:
        if float(group["lr"]) > _SHARE * float(group.get("initial_lr", 0.0)):  # also: above zero
            enough.update(id(parameter) for parameter in group["params"])
    return {name: id(parameter) in enough for name, parameter in trainable.items()}


def _checksums(trainable: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Add up the bits of each A and B, which float sums would round away."""
    adapters = {name: tensor.detach() for name, tensor in trainable.items() if ".lora_A." in name or ".lora_B." in name}
    if not adapters:
        return {}
    sums = torch.stack([_bits(tensor).sum(dtype=torch.int64) for tensor in adapters.values()])
    return dict(zip(adapters, sums.tolist(), strict=True))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
