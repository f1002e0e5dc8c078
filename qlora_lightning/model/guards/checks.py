"""Checks of what silently breaks training: token ids, training mode, gradients, a base that changes."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from qlora_lightning.model.batch import join_places, row_places
from qlora_lightning.support.errors import UserError


def check_token_ids(batch: Mapping[str, Any], vocabulary: int, data: Any) -> None:
    """Refuse a token id that has no row in the embedding.

    A token that stands only at the end of rows, as a stop token does, is never looked up there, for its state predicts
    nothing: else only the loss would meet it, as a label.

    Args:
        batch: ``input_ids``, ``(1, tokens)``, ``cu_seqlens`` and, for the message, ``row_ids``.
        vocabulary: Rows of the embedding.
        data: The Trainer's data module, or ``None``: it knows the places of training rows.

    Raises:
        UserError: An id is negative, or not below the vocabulary.
    """
    ids = batch["input_ids"][0]
    outside = ((ids < 0) | (ids >= vocabulary)).nonzero()[:, 0]
    if not len(outside):
        return
    first = outside[:1]
    sample = int(torch.searchsorted(batch["cu_seqlens"].to(first), first, right=True)) - 1
    rows = [] if batch.get("row_ids") is None else batch["row_ids"][sample : sample + 1].tolist()
    place = f" of {join_places(row_places(data, rows))}" if rows else ""
    raise UserError(
        f"A token{place} has the id {int(ids[first]):,}, and the base has embeddings only for ids below "
        f"{vocabulary:,}: the tokenizer has tokens that the base lacks, such as a stop token that was added to it. "
        "Use the base's own tokenizer, or a base whose embedding was resized for this one."
    )


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


_GROWN = 1.0  # A begins below it, B at zero, and sound training leaves both far below


def check_training_mode(model: nn.Module) -> None:
    """Refuse a model left in evaluation mode: no dropout, and no activation checkpointing without a word.

    Hugging Face models come in ``eval()``, generation leaves them there, and Lightning keeps what it finds.

    Raises:
        RuntimeError: The model is not in training mode.
    """
    asleep = [name for name, module in model.named_modules() if not module.training]
    if asleep:
        raise RuntimeError(
            f"The model is in evaluation mode in a training step ({len(asleep)} modules, as {asleep[0] or 'all'}): "
            "dropout and activation checkpointing would be off. "
            "A callback or hook called `model.eval()` or `generate`; call `model.train()` after it."
        )


def check_callbacks(callbacks: Iterable[object], *needed: type) -> None:
    """Refuse to train without the callbacks that the module itself brings along, and with averages of the whole model.

    Raises:
        RuntimeError: A subclass overrides ``configure_callbacks`` and leaves it out.
        UserError: A callback of Lightning averages weights: its copy is made before there is a model, and does nothing,
            or holds the packed bytes of the base.
    """
    present = list(callbacks)
    averages = [each for each in present if isinstance(each, StochasticWeightAveraging | WeightAveraging)]
    if averages:
        raise UserError(
            f"{type(averages[0]).__name__} averages the weights of a whole model, which here are the packed bytes of a "
            "frozen base. Average the adapter instead: `ema: {decay: 0.999}` in the config, AdapterEMA() in Python."
        )
    missing = [kind for kind in needed if not any(isinstance(callback, kind) for callback in present)]
    if missing:
        raise RuntimeError(
            f"{missing[0].__name__} is missing, and runs would not resume, or not be watched over: return "
            "`[*super().configure_callbacks(), …]` from `configure_callbacks`."
        )


def check_gradients(trainable: Mapping[str, nn.Parameter]) -> bool:
    """Refuse adapters that get no gradient.

    B has one from the first step. A's is exactly zero until B has moved away from zero, so A is asked only then.

    Args:
        trainable: The tensors that train, by name, after backward.

    Returns:
        Whether all could be asked: not yet while an A waits for its B.

    Raises:
        RuntimeError: A tensor has no gradient, or one of zeros only.
    """
    dead, waiting = find_dead_gradients(trainable)
    if dead:
        raise RuntimeError(
            f"{len(dead)} of {len(trainable)} trainable tensors get no gradient, as {', '.join(dead[:3])}: they would "
            "never learn. A frozen layer passes no gradient, or compute_loss does not use them."
        )
    return not waiting


def check_held(trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that was not given every tensor that trains: it would stay as it is.

    Args:
        trainable: The tensors that train, by name.
        optimizer: What moves them.

    Raises:
        RuntimeError: One is in none of its groups.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if left:
        raise RuntimeError(
            f"{len(left)} of {len(trainable)} trainable tensors are in none of the optimizer's groups, as "
            f"{', '.join(left[:3])}: they would stay as they are. Let `parameter_groups` return every trainable tensor."
        )


def find_divergence(trainable: Mapping[str, nn.Parameter], step: int, learning_rate: float) -> UserError | None:
    """Find adapters that have grown beyond use: their gradients vanish, or their steps are too small for their size.

    Args:
        trainable: The tensors that train, by name.
        step: Optimizer step, from 0.
        learning_rate: Of that step.

    Returns:
        The error to raise for it; ``None`` where they are of a usual size.
    """
    sizes = {name: tensor.detach().abs().max() for name, tensor in trainable.items() if ".lora_" in name}
    if not sizes:
        return None
    values = dict(zip(sizes, torch.stack(list(sizes.values())).tolist(), strict=True))
    name = max(values, key=lambda each: values[each] if math.isfinite(values[each]) else math.inf)
    if values[name] <= _GROWN:  # False of a NaN
        return None
    return UserError(
        f"Training has diverged by step {step}, at learning rate {learning_rate:.3g}: adapters hold weights up to "
        f"{values[name]:.3g} ({name}; usual are less than 0.1), and no longer learn. Lower model.learning_rate, let it "
        "rise by model.warmup_ratio, and start again, or go on from a checkpoint before it."
    )


def find_dead_gradients(trainable: Mapping[str, nn.Parameter]) -> tuple[list[str], list[str]]:
    """Name the tensors that have no gradient, and the A's that may have one of zeros, since their B is zero still.

    Of an adapter a gradient of zeros counts as none; of an embedding's rows, say, all may be absent from a window.
    """
    adapters = [name for name in trainable if ".lora_A." in name or ".lora_B." in name]
    given = [name for name in adapters if trainable[name].grad is not None]
    alive = [trainable[name].grad.any() for name in given]  # type: ignore[union-attr]  # not None, see above
    zero = {name for name, lives in zip(given, torch.stack(alive).tolist() if alive else [], strict=True) if not lives}
    waiting = [name for name in adapters if ".lora_A." in name and not _has_moved(name, trainable)]
    dead = [name for name, p in trainable.items() if p.grad is None or name in zero - set(waiting)]
    return dead, waiting


def _has_moved(name_of_a: str, trainable: Mapping[str, nn.Parameter]) -> bool:
    b = trainable.get(name_of_a.replace(".lora_A.", ".lora_B."))
    return b is not None and bool(b.detach().any())


def check_trainer(precision: str, strategy: str, quantization: str) -> None:
    """Refuse Trainer settings under which training would go wrong without a word.

    Args:
        precision: Lightning's name, as ``32-true``.
        strategy: Class name of Lightning's strategy.
        quantization: How the base is stored.

    Raises:
        UserError: The adapters would lose precision, or the strategy would break a quantized base.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise UserError(
            f"trainer.precision is {precision}: it would cast the adapters' float32 masters down, and small updates "
            "would vanish. Leave it at 32-true; the products are computed in model.compute_dtype anyway."
        )
    if "FSDP" in strategy or "DeepSpeed" in strategy or "ModelParallel" in strategy:
        raise UserError(
            f"trainer.strategy is {strategy}, which shards parameters: with a base quantized as {quantization} that is "
            "silently wrong or unverified. Use `trainer.strategy: ddp`: each device holds its own small base."
        )
