"""A config as a plan: its model without numbers, its batches, the memory of its steps, and what changes would save."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.commands.epoch import Epoch, plan_epoch, training_plan
from qlora_lightning.commands.plan.base import find_config, find_tokenizer
from qlora_lightning.commands.plan.report import Device, Knob, Plan, RunLength
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.data.batches.epoch_plan import epochs_to_look_at, first_and_largest
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.model.base_model import Quantization, check_stored_quantization
from qlora_lightning.model.batch import BatchShape, computed_counter, shape_of_rows
from qlora_lightning.model.build import fuse, meta_base, put_adapters
from qlora_lightning.model.device import choose_compute_dtype, device_memory_gib, read_resident_bytes
from qlora_lightning.model.layers.attention import can_leave_out
from qlora_lightning.model.layout import filled
from qlora_lightning.model.memory.plan import (
    MOST_LENGTHS,
    MemoryPlan,
    StepSettings,
    name_storage,
    plan_memory,
    read_base,
)
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.support.errors import UserError

_CONTEXT = 600_000_000  # bytes that CUDA, cuBLAS and the kernels take on a card, beside tensors; an estimate
_SHORTEST = 256  # tokens: rows that are shorter already are not cut


def plan_run(arguments: Sequence[str], memory: int | None) -> Plan:
    """Parse options as ``fit`` does, and plan what they describe: no Trainer, no model, no run folder.

    Args:
        arguments: options of ``fit``.
        memory: bytes of the device, if the user names them.
    """
    run = _LocalRun(arguments, with_trainer=False)
    return make_plan(run.model, run.datamodule, run.no_tokenizer, run.config.as_dict(), memory)


class _LocalRun(QLoRACLI):
    """Takes a tokenizer of this machine."""

    no_tokenizer: str | None = None

    def before_instantiate_classes(self) -> None:
        data = self.config["data"].get("init_args") or {}
        if "tokenizer" in data:
            data["tokenizer"], self.no_tokenizer = find_tokenizer(data["tokenizer"])


def make_plan(module: Any, data: Any, no_tokenizer: str | None, settings: dict[str, Any], memory: int | None) -> Plan:
    """Plan a config.

    Args:
        module: A ``QLoRAModule`` without its model.
        data: The data module, not yet set up.
        no_tokenizer: Why the data cannot be rendered here.
        settings: The whole config.
        memory: Bytes of the device, if the user names them.
    """
    if not isinstance(module, QLoRAModule):
        raise UserError(f"model.class_path names {type(module).__name__}: plan knows QLoRAModule and its subclasses.")
    trainer, checkpointing = settings["trainer"], settings["gradient_checkpointing"]
    device = _choose_device(str(trainer["accelerator"]), memory)
    config, origin = find_config(module.base, module.revision, module.trust_remote_code)
    double_quant, is_stored_quantized = module.double_quant, getattr(config, "quantization_config", None) is not None
    if is_stored_quantized:
        stored = check_stored_quantization(config, module.quantization, module.base)
        double_quant = bool(stored.get("bnb_4bit_use_double_quant", False))
    choice = Choice(
        quantization=module.quantization,
        double_quant=double_quant,
        optimizer=module.optimizer_choice,
        adapter=module.adapter,
        adapter_options=module.adapter_options,
        fast=module.fast,
        has_noise=module.neftune_alpha is not None,
        every_n_layers=checkpointing["every_n_layers"] if checkpointing["enabled"] else 0,
    )
    planner = Planner(config, device.kind, module.compute_dtype)
    run = measure_run(data, trainer, no_tokenizer, planner.leaves_out(choice))
    is_mapped = module.cache or is_stored_quantized or module.quantization == "none"
    choice = replace(choice, batch=run.batch, batch_lengths=run.batch_lengths, ids=run.ids if is_mapped else None)
    peak = planner.plan(choice)
    changes = _changes(choice, config.num_hidden_layers, trainer["accumulate_grad_batches"], data)
    knobs = [
        Knob(change, peak.peak_bytes - planner.plan(changed).peak_bytes, costs) for change, changed, costs in changes
    ]
    notes = [] if run.why_not is None else [f"The data were not read. {run.why_not}"]
    if device.kind == "cuda":
        notes.append("Figures for GPUs are an estimate: their formulas were checked on CPUs only.")
    for name in ("build_model", "compute_loss"):
        if module.overrides(name):
            notes.append(f"{type(module).__name__} has a {name} of its own: planned is the usual one.")
    return Plan(
        base=module.base,
        origin=origin,
        storage=name_storage(choice.quantization, choice.double_quant, planner.dtype.itemsize),
        model=planner.model(choice),
        shape=read_base(planner.model(choice)),
        dtype=planner.dtype,
        memory=peak,
        device=device,
        knobs=sorted((knob for knob in knobs if knob.saves > 0), key=lambda knob: -knob.saves),
        run=run,
        notes=notes,
    )


def _choose_device(accelerator: str, memory: int | None) -> Device:
    """Choose whose memory is planned; ``auto`` is CUDA if this machine has it, or if the user names its memory."""
    if accelerator not in ("auto", "gpu", "cuda", "cpu"):
        raise UserError(f"trainer.accelerator is {accelerator}: plan knows cpu, gpu and auto.")
    has_gpu = torch.cuda.is_available()
    kind = "cpu" if accelerator == "cpu" or (accelerator == "auto" and memory is None and not has_gpu) else "cuda"
    if memory is not None:
        return Device(kind, memory, named=True)
    if kind == "cuda" and not has_gpu:
        raise UserError("trainer.accelerator asks for a GPU, and there is none here: give --device-memory, as 16GiB.")
    return Device(kind, int(device_memory_gib(torch.device(kind)) * 2**30), named=False)


# ---- the model and its memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """All that a plan depends on, beside the base; settings are named as under ``model``.

    Attributes:
        has_noise: Whether there is a ``model.neftune_alpha``.
        every_n_layers: Every n-th layer is checkpointed; 0: none.
        batch: The largest micro-batch; none before the data are read.
        batch_lengths: How many numbers of tokens the run's micro-batches have.
        ids: Token ids of the data, if only what is read of the embedding is in memory; ``None``: all of it is.
    """

    quantization: Quantization
    double_quant: bool
    optimizer: str | dict[str, Any] | None
    adapter: str | None
    adapter_options: dict[str, Any]
    fast: bool
    has_noise: bool
    every_n_layers: int
    batch: BatchShape = BatchShape((), 0)  # noqa: RUF009  # frozen
    batch_lengths: int = 1
    ids: Any = None


class Planner:
    """Plans choices on one base, given by transformers' config, and one kind of device, ``cpu`` or ``cuda``."""

    def __init__(self, config: Any, device: str, compute_dtype: Any) -> None:
        self.config, self.device = config, device
        self.process = read_resident_bytes() if device == "cpu" else _CONTEXT
        if device == "cuda" and not torch.cuda.is_available():  # a config for another machine: a card of this decade
            meta = torch.device("meta")
            self.dtype = torch.bfloat16 if compute_dtype == "auto" else choose_compute_dtype(compute_dtype, meta)
        else:
            self.dtype = choose_compute_dtype(compute_dtype, torch.device(device))
        self._built: dict[str, tuple[peft.PeftModel, bool]] = {}

    def model(self, choice: Choice) -> peft.PeftModel:
        """Return the model of a choice, without numbers."""
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


def _changes(now: Choice, layers: int, accumulate: int, data: Any) -> Iterator[tuple[str, Choice, str]]:
    """Yield each change of one setting that applies: what to type, the changed choice, what it costs in words."""
    lengths, size, budget = now.batch.lengths, data.batch_size, data.tokens_per_batch
    if now.every_n_layers != 1:
        option = "every_n_layers: 1" if now.every_n_layers else "enabled: true"
        changed = replace(now, every_n_layers=1)
        yield f"gradient_checkpointing.{option}", changed, "same result, about a third slower"
    if size is not None and size > 1 and len(lengths) > 1:
        rows = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        change = f"data.batch_size: {rows}, trainer.accumulate_grad_batches: {accumulate * size // rows}"
        yield change, replace(now, batch=now.batch.longest(rows)), "same result, a little slower"
    if budget is not None and max(lengths) <= budget // 2:
        change = f"data.tokens_per_batch: {budget // 2}, trainer.accumulate_grad_batches: {2 * accumulate}"
        half = now.batch.longest(math.ceil(len(lengths) / 2))
        yield change, replace(now, batch=half), "nearly the same result, a little slower"
    if (length := max(lengths) // 2) >= _SHORTEST:
        shorter = replace(now, batch=now.batch.cut(length))
        yield f"data.max_length: {length}", shorter, "longer rows are cut, see data.too_long"
    if now.quantization in ("int8", "none"):
        four = replace(now, quantization="nf4", double_quant=True)
        yield "model.quantization: nf4", four, "a base in 4 bits: small losses of quality"
    elif not now.double_quant:
        yield "model.double_quant: true", replace(now, double_quant=True), "next to nothing"
    if now.optimizer is None:
        name = "bitsandbytes.optim.AdamW8bit"
        yield f"model.optimizer: {name}", replace(now, optimizer=name), "averages in 8 bits"
    options = now.adapter_options
    if now.adapter is None and not options["lora_options"]:
        if rank := int(options["rank"]) // 2:
            yield f"model.rank: {rank}", replace(now, adapter_options={**options, "rank": rank}), "a smaller adapter"
        if options["layers"] == "all" and layers > 1:
            upper = f"last:{layers // 2}"
            fewer = replace(now, adapter_options={**options, "layers": upper})
            yield f"model.layers: {upper}", fewer, "trains the upper half of the layers only; faster"


# ---- the run ---------------------------------------------------------------------------------------------------------


def measure_run(data: Any, trainer: dict[str, Any], no_tokenizer: str | None, leaves_out: bool) -> RunLength:
    """Read the training data and plan their batches; if that cannot be done, take the largest batch there can be.

    Args:
        data: The data module, not yet set up.
        trainer: The trainer section of the config.
        no_tokenizer: Why the data cannot be rendered here.
        leaves_out: Whether tokens that the loss does not need are left out.
    """
    try:
        for split in ("train", "val"):
            value = data.files[split]
            for source in [] if value is None else find_sources(value, split):
                if source.is_remote:
                    raise UserError(f"{source.path} in data.{split} is not on this machine, and plan fetches nothing.")
        if no_tokenizer is not None:
            raise UserError(no_tokenizer)
        data.setup("fit")
    except UserError as error:
        if "train" not in data.samples:
            return RunLength(_largest_allowed(data), why_not=str(error))
    plan = training_plan(data)
    epoch = plan_epoch(plan, trainer, streaming=data.streaming)
    epochs = range(1) if data.streaming else epochs_to_look_at(plan, max_epochs=epoch.epochs)
    count = computed_counter(plan.samples, leaves_out)
    found = first_and_largest(plan, epochs, limit=epoch.batches, count=count)
    if found is None:
        return RunLength(_largest_allowed(data), why_not="There are no training rows.")
    batches = [batch for number in epochs for batch in plan.batches(number)[: epoch.batches]]
    batches = batches[: None if epoch.all_steps is None else epoch.all_steps * epoch.accumulate]
    lengths: set[int] = set()
    for batch in batches:
        lengths.add(filled(count(batch.rows)))
        if len(lengths) == MOST_LENGTHS:
            break
    largest = shape_of_rows(plan.samples, found[1].rows)
    return RunLength(largest, epoch, _count_tokens(epoch), len(lengths), plan.samples.ids)


def _count_tokens(epoch: Epoch) -> int | None:
    """Count the tokens of all optimizer steps; ``None`` if nothing ends the run."""
    if epoch.all_steps is None:
        return None
    whole = epoch.epochs is not None and epoch.all_steps == epoch.epochs * epoch.steps
    batches = (epoch.epochs or 0) * epoch.batches if whole else epoch.all_steps * epoch.accumulate
    return round(batches * epoch.devices * epoch.mean_tokens)


def _largest_allowed(data: Any) -> BatchShape:
    """Return the largest micro-batch that the settings allow: rows of ``max_length``, every token of them labelled."""
    if data.tokens_per_batch is None:
        lengths = (data.max_length,) * data.batch_size
    else:
        whole, rest = divmod(data.tokens_per_batch, data.max_length)
        lengths = (data.max_length,) * whole + ((rest,) if rest else ())
    return BatchShape(lengths, sum(lengths) - len(lengths))
