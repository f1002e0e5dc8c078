"""Use the formula to find how a step fits: how many tokens at a time, and with which checkpointing."""

import gc
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import peft
import torch

from qlora_lightning.model.activation_checkpointing import Checkpointing
from qlora_lightning.model.adapters.folder import settings_of_folder
from qlora_lightning.model.layers.select import fuse_layers
from qlora_lightning.model.load.base_model import check_quantization
from qlora_lightning.model.load.build import meta_base, put_adapters
from qlora_lightning.model.load.machine import choose_compute_dtype, free_bytes
from qlora_lightning.model.load.wrapped import open_text_config
from qlora_lightning.model.memory.formula import CONTEXT_BYTES, StepMemory, build_step_memory
from qlora_lightning.model.protocol import Module
from qlora_lightning.model.sharded import ShardedDDPStrategy
from qlora_lightning.model.step.packed import samples_of
from qlora_lightning.sources.folders import find_adapter_folder, open_base, read_config
from qlora_lightning.sources.tensors import format_gib
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of

TOKENS_OF_A_CPU = 8192  # more tokens do not make its products faster
USABLE = 0.9  # fraction of the memory; the rest is for fragments, and for things that the formula omits
_USABLE_ON_CPU = 0.7  # a CPU's heap has more fragments, and oneDNN keeps code for each shape
_MAX_TOKENS = 1 << 20
_FEW_TOKENS = 512


class Fit(NamedTuple):
    """How a step fits: the most ``tokens`` per micro-batch, or 0 if the longest row does not fit."""

    tokens: int
    choice: Checkpointing


def list_remedies(*, in_4_bits: bool, checkpoints: bool, on_cuda: bool) -> str:
    """List settings that need less memory; ``checkpoints`` says that checkpointing is already on or would not help."""
    remedies = ["a smaller data.max_length", "a smaller model.rank", "a smaller model.base"]
    remedies += [] if in_4_bits else ["model.quantization: nf4"]
    remedies += [] if checkpoints else ["gradient_checkpointing.enabled: auto"]
    remedies += ["trainer.strategy: ddp_sharded_offload"] if on_cuda else []
    return f"{', '.join(remedies[:-1])} or {remedies[-1]}"


def find_fits(step: StepMemory, usable: float, longest: int, choices: Sequence[Checkpointing]) -> list[Fit]:
    """Find the choices of checkpointing with which the longest row fits alone; if there are none, return the last one.

    ``usable`` is in bytes, ``longest`` in tokens. Each choice needs less memory than the previous one.
    """
    fits = []
    for choice in choices:
        tokens = bisect_right(range(_MAX_TOKENS), usable, key=lambda n: sum(step.parts(n, choice).values())) - 1
        fits.append(Fit(tokens, choice))
    enough = [fit for fit in fits if fit.tokens >= longest]
    # with few tokens at a time, checkpointing costs less than making weights dense again for each part
    return [fit for fit in enough if fit.tokens >= _FEW_TOKENS] or enough or [Fit(0, choices[-1])]


def plan_step(
    module: Module,
    config: Any,
    dtype: torch.dtype,
    processes: int,
    sharded_offload: bool | None,
    samples: Any = None,
) -> tuple[peft.PeftModel, StepMemory]:
    """Build a module's model on the meta device, and the formula for its step.

    ``dtype`` is the dtype of the products. ``samples`` are those of the training rows, or ``None`` if unknown. For the
    other arguments, see :func:`~qlora_lightning.model.memory.formula.build_step_memory`.
    """
    quantization_config = getattr(config, "quantization_config", None)
    double_quant = check_quantization(quantization_config, module.quantization, module.double_quant, module.base)
    folder = None if module.adapter is None else find_adapter_folder(module.adapter)
    base = meta_base(config, dtype, module.quantization)
    if folder is not None:
        settings_of_folder(folder, base, module.adapter_options)  # rejects settings that differ
    model = put_adapters(base, folder, **module.adapter_options).to("meta")
    fuse_layers(model, module.fast)
    settings: dict[str, Any] = {"double_quant": double_quant, "optimizer": module.optimizer_config}
    settings |= {"processes": processes, "sharded_offload": sharded_offload}
    if samples is not None:
        settings["row_tokens"] = float(np.quantile(samples.lengths, 0.1)) / (2 if module.pairs else 1)
    return model, build_step_memory(model, dtype, **settings)


def memory_for_step(device: torch.device) -> int:
    """Read how many bytes a step may use before its base is loaded, including CUDA's context (see the formula)."""
    gc.collect()  # the model of an earlier run in this process is in reference cycles
    return free_bytes(device) + CONTEXT_BYTES  # the context exists already


def plan_fits(module: Module, choices: Sequence[Checkpointing], memory: int) -> list[Fit] | None:
    """Plan a fit for each choice with which the longest row fits, before any weight is downloaded or loaded.

    ``memory`` is the number that :func:`memory_for_step` read. Return ``None`` if the base has its own code or
    ``build_model`` is overridden, because these may not work on the meta device.

    Raises:
        UserError: If the longest row does not fit on the GPU with any choice, according to a formula and not an
            estimate.
    """
    if module.overrides("build_model"):
        return None
    source = open_base(module.base, module.revision, weights=False)
    stored = read_config(source.folder, source.name)
    if module.trust_remote_code and "auto_map" in stored:
        return None
    config = open_text_config(source.folder, module.base)
    strategy, device = module.trainer.strategy, module.trainer.strategy.root_device
    dtype = choose_compute_dtype(module.compute_dtype, device, config.model_type)
    sharded_offload = strategy.offload if isinstance(strategy, ShardedDDPStrategy) else None
    data = datamodule_of(module.trainer)
    samples = samples_of(data, "train")  # a preference pair counts both answers
    _, step = plan_step(module, config, dtype, module.trainer.world_size, sharded_offload, samples)
    longest = getattr(data, "max_length", TOKENS_OF_A_CPU) if samples is None else int(samples.lengths.max())
    longest = min(longest, _MAX_TOKENS - 1)
    on_gpu = device.type == "cuda"
    fits = find_fits(step, (USABLE if on_gpu else _USABLE_ON_CPU) * memory, longest, choices)
    if not on_gpu:  # for a CPU, the formula only tells whether memory is short
        return [fit._replace(tokens=min(fit.tokens or longest, TOKENS_OF_A_CPU)) for fit in fits]
    if not fits[0].tokens and step.is_fused:  # if not fused, this is an estimate, and the longest row is tried
        choice = fits[0].choice
        planned, fixed = sum(step.parts(longest, choice).values()), sum(step.fixed.values())
        in_4_bits = module.quantization in ("nf4", "fp4")
        remedies = list_remedies(in_4_bits=in_4_bits, checkpoints=choice.checkpointed, on_cuda=True)
        raise UserError(
            f"{module.base} does not fit: {choice} one row of {longest:,} tokens is planned to take "
            f"{format_gib(planned)} ({format_gib(fixed)} without its activations), and {device} has "
            f"{format_gib(USABLE * memory)} for it. What is left: {remedies}. To try it without a plan, set "
            "model.micro_batch_tokens to a number.",
            "memory.row",
        )
    return [fit._replace(tokens=fit.tokens or longest) for fit in fits]
