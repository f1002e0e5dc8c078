"""Checksums of what must not change while adapters train: the frozen base, and what its weights are scaled by."""

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

_WHOLE = 1 << 20  # a tensor of up to so many bytes is read whole
_RUNS = 16  # of a larger one as many runs of bytes are read, evenly spaced: each may be a read of its own from a disk
_RUN_BYTES = 16 << 10


def checksum_frozen(model: nn.Module) -> dict[str, int]:
    """Sum up every frozen parameter and its quantization scales; positions count, so that moved bytes show.

    Buffers are left out: rotary embeddings may rescale theirs to the longest row. Tensors of more than 1 MiB are read
    in 16 evenly spaced runs, so that a base mapped from a file is not read in for it. A change of a whole tensor is
    found, of a single row of a large one perhaps not.
    """
    tensors = dict(_frozen_tensors(model))
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    found: dict[str, int] = {}
    for device, names in by_device.items():
        weights = torch.arange(1, _WHOLE // 8 + 1, device=device) * 2 + 1  # odd: no bit of a word is lost
        sums = torch.stack([_sum_words(tensors[name], weights) for name in names])
        found |= zip(names, sums.tolist(), strict=True)  # one wait for the device
    return found


def check_frozen(before: dict[str, int], now: dict[str, int]) -> None:
    """Refuse a frozen tensor that is no longer what it was: the adapter would be trained on another base.

    Raises:
        RuntimeError: One changed, went or came.
    """
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        raise RuntimeError(
            f"{len(changed)} of {len(before)} frozen tensors changed during training, as {', '.join(changed[:3])}: the "
            "adapter no longer belongs to the base it is loaded on. An optimizer that holds frozen tensors, a hook or "
            "a callback that writes to the base does that; go on from a checkpoint before it."
        )


def _frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.detach()
            yield from _scales(name, parameter)
    for name, module in model.named_modules():
        scales = int8_scales(module)
        if scales is not None:
            yield f"{name}.weight.SCB", scales


def int8_scales(module: nn.Module) -> Tensor | None:
    """Give what an int8 linear's weight is scaled by; ``None`` of any other module."""
    if not isinstance(module, bnb.nn.Linear8bitLt):
        return None
    # The first forward moves it from the weight to the module.
    scales: Tensor | None = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return scales


def _scales(name: str, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes multiplies a weight in 4 bits by, kept beside it as plain attributes."""
    state = getattr(parameter, "quant_state", None)  # of Params4bit
    nested = getattr(state, "state2", None)  # double quantization: the scales' own scales
    scales = {
        "absmax": getattr(state, "absmax", None),
        "nested_absmax": getattr(nested, "absmax", None),
    }
    yield from ((f"{name}.{key}", scale) for key, scale in scales.items() if isinstance(scale, Tensor))


def _sum_words(tensor: Tensor, weights: Tensor) -> Tensor:
    """Add up 8-byte words, each times a weight of its place; int64 wraps around, which loses nothing."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(data) > _WHOLE:
        spread = len(data) // _RUNS // 8 * 8  # words must stay aligned
        data = torch.cat([data[start : start + _RUN_BYTES] for start in range(0, _RUNS * spread, spread)])
    words = data[: len(data) // 8 * 8].view(torch.int64)
    rest = data[len(words) * 8 :].sum(dtype=torch.int64)
    return (words * weights[: len(words)]).sum() + rest
