"""A config as a plan: the weightless model, and the memory of its steps."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora_lightning.commands.plan.run_length import RunLength
from qlora_lightning.model.base_model import Quantization, check_stored_quantization
from qlora_lightning.model.batch import BatchShape
from qlora_lightning.model.build import build_skeleton
from qlora_lightning.model.device import choose_compute_dtype
from qlora_lightning.model.layers.attention import can_leave_out
from qlora_lightning.model.memory.plan import MemoryPlan, StepSettings, plan_memory, share_unread
from qlora_lightning.model.memory.shapes import (
    ModelShape,
    are_alike,
    checkpoint_layers,
    deepen,
    name_storage,
    read_model,
    shorten,
)
from qlora_lightning.support.errors import UserError

_CONTEXT = 600_000_000  # bytes that CUDA, cuBLAS and the kernels take on a card, beside tensors; an estimate
_NOT_READ = BatchShape((), 0)


@dataclass(frozen=True)
class Choice:
    """All that a plan depends on, beside the base and the data.

    Attributes:
        quantization: ``model.quantization``.
        double_quant: ``model.double_quant``.
        optimizer: ``model.optimizer``.
        adapter: ``model.adapter``.
        adapter_options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`.
        fast: ``model.fast``.
        has_noise: Whether there is a ``model.neftune_alpha``.
        every_n_layers: Every n-th layer is checkpointed; 0: none.
        is_mapped: Whether the base is mapped from a file.
        batch: The largest micro-batch; none before the data are read.
        batch_lengths: How many numbers of tokens the run's micro-batches have.
        ids: Token ids of the data, where only what is read of the embedding lies in memory; ``None``: all of it does.
    """

    quantization: Quantization
    double_quant: bool
    optimizer: str | dict[str, Any] | None
    adapter: str | None
    adapter_options: dict[str, Any]
    fast: bool
    has_noise: bool
    every_n_layers: int
    is_mapped: bool
    batch: BatchShape = _NOT_READ
    batch_lengths: int = 1
    ids: Any = None

    def on(self, run: RunLength) -> "Choice":
        """Give the same with the batches of a run."""
        ids = run.ids if self.is_mapped else None
        return replace(self, batch=run.batch, batch_lengths=run.batch_lengths, ids=ids)


class Planner:
    """Plans choices on one base and one kind of device.

    Args:
        config: transformers' config of the base.
        device: ``cpu`` or ``cuda``.
        compute_dtype: ``model.compute_dtype``.
        process: Bytes of this process without a model.
    """

    def __init__(self, config: Any, device: str, compute_dtype: Any, process: int) -> None:
        self.config, self.device = config, device
        self.dtype = _choose_dtype(compute_dtype, device)
        self.process = process if device == "cpu" else _CONTEXT
        self._models: dict[str, nn.Module] = {}
        self._shapes: dict[str, ModelShape] = {}
        self._can_leave_out: dict[str, bool] = {}

    def model(self, choice: Choice) -> nn.Module:
        """Give the weightless model of a choice; of layers that are alike it has two.

        Raises:
            UserError: A setting of the adapters cannot be used.
        """
        key = _key(choice)
        if key not in self._models:
            shortens = self.config.num_hidden_layers > 2 and are_alike(
                self.config, choice.adapter, choice.adapter_options
            )
            self._models[key] = self._build(choice, shorten(self.config, 2) if shortens else self.config)
        return self._models[key]

    def shape(self, choice: Choice) -> ModelShape:
        """Give the shape of the model with all its layers, checkpointed as chosen."""
        key = _key(choice)
        if key not in self._shapes:
            self._shapes[key] = self._read_shape(choice)
        return checkpoint_layers(self._shapes[key], choice.every_n_layers)

    def _read_shape(self, choice: Choice) -> ModelShape:
        shape, layers = read_model(self.model(choice), self.dtype.itemsize), self.config.num_hidden_layers
        if len(shape.layers) == layers:
            return shape
        one = read_model(self._build(choice, shorten(self.config, 1)), self.dtype.itemsize)
        return deepen(one, shape, layers)

    def _build(self, choice: Choice, config: Any) -> Any:
        return build_skeleton(
            config,
            compute_dtype=self.dtype,
            quantization=choice.quantization,
            adapter=choice.adapter,
            adapter_options=choice.adapter_options,
            fast=choice.fast,
        )

    def plan(self, choice: Choice, shape: ModelShape | None = None) -> MemoryPlan:
        """Plan the memory of a choice.

        Args:
            choice: What to plan.
            shape: The model, if it is another than the choice's own.
        """
        shape = self.shape(choice) if shape is None else shape
        number_bytes = self.dtype.itemsize
        settings = StepSettings(
            storage=name_storage(choice.quantization, choice.double_quant, number_bytes),
            number_bytes=number_bytes,
            optimizer=choice.optimizer,
            device=self.device,
            process=self.process,
            batch_lengths=choice.batch_lengths,
            unread=0.0 if choice.ids is None else share_unread(choice.ids, shape.base, number_bytes),
        )
        return plan_memory(shape, choice.batch if self.leaves_out(choice) else choice.batch.whole(), settings)

    def leaves_out(self, choice: Choice) -> bool:
        """Say whether tokens that no label needs are left out, as ``QLoRAModule.leaves_out_unneeded`` would."""
        if not choice.fast or choice.has_noise:
            return False
        key = _key(choice)
        if key not in self._can_leave_out:
            self._can_leave_out[key] = can_leave_out(self.model(choice), training=True)
        return self._can_leave_out[key]


def _key(choice: Choice) -> str:
    return repr((choice.quantization, choice.adapter, choice.adapter_options, choice.fast))


def read_choice(module: Any, checkpointing: dict[str, Any], config: Any) -> Choice:
    """Read the choice of a config.

    Args:
        module: A ``QLoRAModule`` without its model.
        checkpointing: The section of that name.
        config: transformers' config of the base, which may be stored quantized.

    Raises:
        UserError: The base is stored quantized in another way than the config says.
    """
    double_quant, stored_so = module.double_quant, getattr(config, "quantization_config", None) is not None
    if stored_so:
        stored = check_stored_quantization(config, module.quantization, module.base)
        double_quant = bool(stored.get("bnb_4bit_use_double_quant", False))
        del config.quantization_config
    return Choice(
        quantization=module.quantization,
        double_quant=double_quant,
        optimizer=module.optimizer_choice,
        adapter=module.adapter,
        adapter_options=module.adapter_options,
        fast=module.fast,
        has_noise=module.neftune_alpha is not None,
        every_n_layers=checkpointing["every_n_layers"] if checkpointing["enabled"] else 0,
        is_mapped=module.cache or stored_so or module.quantization == "none",
    )


def choose_device(accelerator: str, *, named_memory: bool) -> str:
    """Choose whose memory is planned: ``cpu`` or ``cuda``.

    ``auto`` is CUDA where this machine has it, or where the user names the memory of a device.

    Args:
        accelerator: ``trainer.accelerator``.
        named_memory: Whether ``--device-memory`` is given.

    Raises:
        UserError: It is another kind of device.
    """
    if accelerator == "auto":
        return "cuda" if named_memory or torch.cuda.is_available() else "cpu"
    if accelerator in ("gpu", "cuda"):
        return "cuda"
    if accelerator == "cpu":
        return "cpu"
    raise UserError(f"trainer.accelerator is {accelerator}: plan knows cpu, gpu and auto.")


def _choose_dtype(name: Any, device: str) -> torch.dtype:
    if device == "cuda" and not torch.cuda.is_available():  # a config for another machine: a card of this decade
        return torch.bfloat16 if name == "auto" else choose_compute_dtype(name, torch.device("meta"))
    return choose_compute_dtype(name, torch.device(device))
