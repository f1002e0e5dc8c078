"""A config as a plan: its model without numbers, and the memory of its steps."""

from dataclasses import dataclass, replace
from typing import Any

import peft
import torch

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.commands.plan.run_length import RunLength
from qlora_lightning.model.base_model import Quantization, check_stored_quantization
from qlora_lightning.model.batch import BatchShape
from qlora_lightning.model.build import fuse, meta_base, put_adapters
from qlora_lightning.model.device import choose_compute_dtype
from qlora_lightning.model.layers.attention import can_leave_out
from qlora_lightning.model.memory.plan import MemoryPlan, StepSettings, plan_memory
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
        self._built: dict[str, tuple[peft.PeftModel, bool]] = {}

    def model(self, choice: Choice) -> peft.PeftModel:
        """Return the model of a choice, without numbers.

        Raises:
            UserError: A setting of the adapters cannot be used.
        """
        return self._build(choice)[0]

    def _build(self, choice: Choice) -> tuple[peft.PeftModel, bool]:
        """Return the model, and whether something trains in PEFT's own layers."""
        key = repr((choice.quantization, choice.adapter, choice.adapter_options, choice.fast))
        if key not in self._built:
            folder = None if choice.adapter is None else find_adapter_folder(choice.adapter)
            base = meta_base(self.config, self.dtype, choice.quantization)
            model = put_adapters(base, folder, **choice.adapter_options).to("meta")
            self._built[key] = model, fuse(model, choice.fast)
        return self._built[key]

    def plan(self, choice: Choice) -> MemoryPlan:
        """Plan the memory of a choice."""
        model, unfused = self._build(choice)
        settings = StepSettings(
            device=self.device,
            dtype=self.dtype,
            quantization=choice.quantization,
            double_quant=choice.double_quant,
            optimizer=choice.optimizer,
            process=self.process,
            autocasts=unfused and self.dtype != torch.float32,
            every_n_layers=choice.every_n_layers,
            batch_lengths=choice.batch_lengths,
            ids=choice.ids,
        )
        return plan_memory(model, choice.batch if self.leaves_out(choice) else choice.batch.whole(), settings)

    def leaves_out(self, choice: Choice) -> bool:
        """Return whether tokens that no label needs are left out, as ``QLoRAModule.leaves_out_unneeded`` would."""
        return choice.fast and not choice.has_noise and can_leave_out(self.model(choice).get_base_model(), True)


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
