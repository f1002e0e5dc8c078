"""Puts a plan together from what the parser of ``fit`` has read."""

from typing import Any

import torch

from qlora_lightning.commands.plan.base_config import find_config
from qlora_lightning.commands.plan.knobs import turn_knobs
from qlora_lightning.commands.plan.planner import Planner, choose_device, read_choice
from qlora_lightning.commands.plan.report import Device, Plan
from qlora_lightning.commands.plan.run_length import RunLength, measure_run
from qlora_lightning.model.device import device_memory_gib, read_resident_bytes
from qlora_lightning.model.memory.plan import name_storage, read_base
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.support.errors import UserError

_GIB = 2**30


def make_plan(module: Any, data: Any, no_tokenizer: str | None, settings: dict[str, Any], memory: int | None) -> Plan:
    """Plan a config.

    Args:
        module: A ``QLoRAModule`` without its model.
        data: The data module, not yet set up.
        no_tokenizer: Why the data cannot be read here.
        settings: The whole config.
        memory: Bytes of the device, if the user names them.

    Raises:
        UserError: The base or a setting cannot be used.
    """
    if not isinstance(module, QLoRAModule):
        raise UserError(f"model.class_path names {type(module).__name__}: plan knows QLoRAModule and its subclasses.")
    trainer = settings["trainer"]
    kind = choose_device(str(trainer["accelerator"]), named_memory=memory is not None)
    base = find_config(module.base, module.revision, module.trust_remote_code)
    choice = read_choice(module, settings["gradient_checkpointing"], base.config)
    planner = Planner(base.config, kind, module.compute_dtype, read_resident_bytes())
    run = measure_run(data, trainer, no_tokenizer, planner.leaves_out(choice))
    choice = choice.on(run)
    batches = data.batch_size, data.tokens_per_batch
    return Plan(
        base=module.base,
        origin=base.origin,
        storage=name_storage(choice.quantization, choice.double_quant, planner.dtype.itemsize),
        model=planner.model(choice),
        shape=read_base(planner.model(choice)),
        dtype=planner.dtype,
        memory=planner.plan(choice),
        device=_device(kind, memory),
        knobs=turn_knobs(planner, choice, trainer["accumulate_grad_batches"], *batches),
        run=run,
        notes=_notes(module, run, kind),
    )


def _device(kind: str, memory: int | None) -> Device:
    if memory is not None:
        return Device(kind, memory, named=True)
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator asks for a GPU, and this machine has none: give --device-memory, as 16GiB."
        )
    return Device(kind, int(device_memory_gib(torch.device(kind)) * _GIB), named=False)


def _notes(module: QLoRAModule, run: RunLength, kind: str) -> list[str]:
    notes = []
    if run.why_not is not None:
        notes.append(f"The data were not read. {run.why_not}")
    if kind == "cuda":
        notes.append("Figures for GPUs are an estimate: their formulas were checked on CPUs only.")
    for name in ("build_model", "compute_loss"):
        if module.overrides(name):
            notes.append(f"{type(module).__name__} has a {name} of its own: planned is the usual one.")
    return notes
