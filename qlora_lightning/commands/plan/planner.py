"""Plans a config: its model without numbers, its batches, the memory of a step, and what one change would save."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pydoc import locate
from typing import Any, cast

import peft
import torch
from lightning.pytorch.strategies import StrategyRegistry

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.base.tensors import GIB, format_gib
from qlora_lightning.commands.epoch import Epoch, count_devices, plan_epoch, training_plan
from qlora_lightning.commands.plan.local_base import find_config, find_tokenizer
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.data.batches.epoch_plan import EpochPlan, epochs_to_look_at, first_and_largest
from qlora_lightning.model.guards.checks import check_trainer
from qlora_lightning.model.layers.attention import can_leave_out
from qlora_lightning.model.layers.elementwise import check_row_length
from qlora_lightning.model.load.base_model import Quantization, check_stored_quantization
from qlora_lightning.model.load.build import fuse, meta_base, put_adapters
from qlora_lightning.model.load.device import choose_compute_dtype, device_memory_gib, read_resident_bytes
from qlora_lightning.model.memory.plan import (
    MOST_LENGTHS,
    STORAGES,
    Sharding,
    StepSettings,
    count_trained,
    name_storage,
    pinned_bytes,
    plan_memory,
    read_base,
)
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.sharded.strategy import SHARDED_STRATEGIES, ShardedDDPStrategy
from qlora_lightning.model.step.batch import BatchShape, computed_counter, shape_of_rows
from qlora_lightning.model.step.layout import filled
from qlora_lightning.support.errors import UserError

_CONTEXT = 600_000_000  # bytes that CUDA, cuBLAS and the kernels take on a card, beside tensors; an estimate
_SHORTEST = 256  # tokens: rows that are shorter already are not cut

Step = tuple[peft.PeftModel, BatchShape, StepSettings]
"""What memory is planned for: a model without numbers, its largest micro-batch, and everything else."""
Build = Callable[[Quantization, dict[str, Any]], tuple[peft.PeftModel, bool]]
"""From a quantization and adapter options to the model without numbers, and whether its products are autocast."""


def plan_run(arguments: Sequence[str], memory: int | None) -> tuple[dict[str, Any], peft.PeftModel]:
    """Parse options as ``fit`` does, and plan what they describe: no Trainer, no weights, no run folder.

    Args:
        arguments: options of ``fit``.
        memory: bytes of the device, if the user names them.

    Returns:
        All figures, in bytes, as the JSON has them; and the model without numbers.
    """
    run = _LocalRun(arguments, with_trainer=False)
    return _plan(run.model, run.datamodule, run.config, memory, run.no_tokenizer)


class _LocalRun(QLoRACLI):
    """Takes a tokenizer that is on this machine."""

    no_tokenizer: UserError | None = None

    def before_instantiate_classes(self) -> None:
        data = self.config["data"].get("init_args") or {}
        if "tokenizer" in data:
            try:
                data["tokenizer"] = find_tokenizer(data["tokenizer"])
            except UserError as error:
                self.no_tokenizer = error


def _plan(
    module: Any, data: Any, settings: Any, memory: int | None, no_tokenizer: UserError | None
) -> tuple[dict[str, Any], peft.PeftModel]:
    if not isinstance(module, QLoRAModule):
        raise UserError(f"model.class_path names {type(module).__name__}: plan knows QLoRAModule and its subclasses.")
    trainer, checkpointing = settings["trainer"], settings["gradient_checkpointing"]
    notes: list[str] = []
    device = _choose_device(str(trainer["accelerator"]), memory)
    is_cuda = device["kind"] == "cuda"
    process = _CONTEXT if is_cuda else read_resident_bytes()  # before there are data and a model
    # a card that is not here is taken for one of this decade
    dtype_device = "meta" if is_cuda and not torch.cuda.is_available() else device["kind"]
    dtype = choose_compute_dtype(module.compute_dtype, torch.device(dtype_device))

    sharding = _read_sharding(trainer)
    if sharding is not None:
        check_trainer(str(trainer["precision"]), ShardedDDPStrategy, module.quantization)
    config, origin = find_config(module.base, module.revision, module.trust_remote_code)
    double_quant, is_stored_quantized = module.double_quant, getattr(config, "quantization_config", None) is not None
    if is_stored_quantized:
        double_quant = check_stored_quantization(config, module.quantization, module.base)
    folder = None if module.adapter is None else find_adapter_folder(module.adapter)

    def build(quantization: Quantization, options: dict[str, Any]) -> tuple[peft.PeftModel, bool]:
        built = put_adapters(meta_base(config, dtype, quantization), folder, **options).to("meta")
        return built, fuse(built, module.fast) and dtype != torch.float32

    model, autocasts = build(module.quantization, module.adapter_options)
    leaves_out = module.fast and module.neftune_alpha is None and can_leave_out(model.get_base_model(), True)
    epoch: Epoch | None = None
    batch, batch_lengths, ids = _largest_allowed(data), 1, None
    try:
        if no_tokenizer is not None:
            raise no_tokenizer
        rows = _plan_batches(data)
        epoch = plan_epoch(rows, trainer, data.streaming)
        batch, batch_lengths = _measure_batches(rows, epoch, data.streaming, leaves_out)
        is_mapped = module.cache or is_stored_quantized or module.quantization == "none"
        ids = rows.samples.ids if is_mapped else None
    except UserError as error:
        epoch = None
        notes.append(f"The data were not read. {error}")
    check_row_length(config, data.max_length)
    longest, known = max(batch.lengths), getattr(config, "max_position_embeddings", None)
    if known is not None and longest > known:
        notes.append(f"Rows of up to {longest:,} tokens: the base was made for {known:,} (max_position_embeddings).")
    if is_cuda:
        notes.append("Figures for GPUs are an estimate: their formulas were checked on CPUs only.")
    for name in ("build_model", "compute_loss"):
        if module.overrides(name):
            notes.append(f"{type(module).__name__} has a {name} of its own: the plan is for the usual one.")

    step_settings = StepSettings(
        device=device["kind"],
        dtype=dtype,
        quantization=module.quantization,
        double_quant=double_quant,
        optimizer=module.optimizer_choice,
        process=process,
        autocasts=autocasts,
        every_n_layers=checkpointing["every_n_layers"] if checkpointing["enabled"] else 0,
        offload=checkpointing["offload"],
        batch_lengths=batch_lengths,
        ids=ids,
        sharding=sharding,
        processes=count_devices(trainer),
    )
    step = model, batch if leaves_out else batch.whole(), step_settings
    planned, shape = plan_memory(*step), read_base(model)
    if is_cuda and checkpointing["enabled"] and checkpointing["offload"]:
        layers = math.ceil(config.num_hidden_layers / checkpointing["every_n_layers"])
        kept = format_gib(layers * pinned_bytes(step[1].computed * config.hidden_size * dtype.itemsize))
        notes.append(f"gradient_checkpointing.offload keeps {kept} in pinned host memory.")
    changes: list[dict[str, Any]] = [
        {"change": change, "saves": planned.peak_bytes - plan_memory(*changed).peak_bytes, "costs": costs}
        for change, costs, changed in _changes(module, data, trainer["accumulate_grad_batches"], step, build)
    ]
    figures = {
        "base": {
            "name": module.base,
            "config": origin,
            "stored": name_storage(module.quantization, double_quant, dtype.itemsize),
            "parameters": shape.parameters,
            "bytes": {storage: shape.count_bytes(storage) for storage in STORAGES},
        },
        "adapters": {"parameters": count_trained(model)},
        "compute_dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "memory": {
            "parts": planned.parts,
            "peak_bytes": planned.peak_bytes,
            "fits": planned.peak_bytes <= device["memory"],
            "host_bytes": planned.host_bytes,
            "sharding": step_settings.sharding and asdict(step_settings.sharding),
        },
        "largest_batch": batch.figures(),
        "changes": sorted((each for each in changes if each["saves"] > 0), key=lambda each: -each["saves"]),
        "run": epoch and {"steps": epoch.all_steps, "tokens": epoch.all_tokens, "epoch": asdict(epoch)},
        "notes": notes,
    }
    return figures, model


def _choose_device(accelerator: str, memory: int | None) -> dict[str, Any]:
    """Choose whose memory is planned; ``auto`` is CUDA if this machine has it, or if the user names its memory."""
    if accelerator not in ("auto", "gpu", "cuda", "cpu"):
        raise UserError(f"trainer.accelerator is {accelerator}: plan knows cpu, gpu and auto.")
    has_gpu = torch.cuda.is_available()
    kind = "cpu" if accelerator == "cpu" or (accelerator == "auto" and memory is None and not has_gpu) else "cuda"
    if memory is not None:
        return {"kind": kind, "memory": memory, "named": True}
    if kind == "cuda" and not has_gpu:
        raise UserError("trainer.accelerator asks for a GPU, and there is none here: add --device-memory, as 16GiB.")
    return {"kind": kind, "memory": int(device_memory_gib(torch.device(kind)) * GIB), "named": False}


def _read_sharding(trainer: Any) -> Sharding | None:
    strategy = trainer["strategy"]
    offloads: bool | int | None = None
    if isinstance(strategy, str):
        if strategy not in ("auto", *StrategyRegistry.available_strategies()):
            raise UserError(f"trainer.strategy is {strategy}, which is no strategy, or has arguments that it lacks.")
        offloads = SHARDED_STRATEGIES.get(strategy)
    elif issubclass(cast(type, locate(strategy["class_path"])), ShardedDDPStrategy):
        offloads = strategy["init_args"]["offload"]
    return None if offloads is None else Sharding(count_devices(trainer), offloads)


# ---- batches ---------------------------------------------------------------------------------------------------------


def _plan_batches(data: Any) -> EpochPlan:
    """Read the training data, unless they are not on this machine; return their micro-batches."""
    for source in [*data.sources("train"), *data.sources("val")]:
        if source.is_remote:
            raise UserError(f"{source.path} is not on this machine, and plan fetches nothing.")
    data.setup("fit")
    return training_plan(data)


def _measure_batches(rows: EpochPlan, epoch: Epoch, streaming: bool, leaves_out: bool) -> tuple[BatchShape, int]:
    """Return the largest micro-batch, and how many numbers of tokens the run's micro-batches have."""
    epochs = range(1) if streaming else epochs_to_look_at(rows, max_epochs=epoch.epochs)
    count = computed_counter(rows.samples, leaves_out)
    found = first_and_largest(rows, epochs, limit=epoch.batches, count=count)
    if found is None:
        raise UserError("There are no training rows.")
    batches = [batch for number in epochs for batch in rows.batches(number)[: epoch.batches]]
    lengths: set[int] = set()
    for batch in batches[: None if epoch.all_steps is None else epoch.all_steps * epoch.accumulate]:
        lengths.add(filled(count(batch.rows)))
        if len(lengths) == MOST_LENGTHS:
            break
    return shape_of_rows(rows.samples, found[1].rows), len(lengths)


def _largest_allowed(data: Any) -> BatchShape:
    """Return the largest micro-batch that the settings allow: rows of ``max_length``, every token of them labelled."""
    if data.tokens_per_batch is None:
        lengths = (data.max_length,) * data.batch_size
    else:
        whole, rest = divmod(data.tokens_per_batch, data.max_length)
        lengths = (data.max_length,) * whole + ((rest,) if rest else ())
    return BatchShape(lengths, sum(lengths) - len(lengths))


# ---- changes ---------------------------------------------------------------------------------------------------------


def _changes(
    module: QLoRAModule, data: Any, accumulate: int, step: Step, build: Build
) -> Iterator[tuple[str, str, Step]]:
    """Yield each change of one setting that applies: what to type, what it costs, and the step that it makes."""
    model, batch, now = step
    size, budget, longest = data.batch_size, data.tokens_per_batch, max(batch.lengths)
    if now.every_n_layers != 1:
        option = "every_n_layers: 1" if now.every_n_layers else "enabled: true"
        changed = model, batch, replace(now, every_n_layers=1)
        yield f"gradient_checkpointing.{option}", "same result, about a third slower", changed
    elif not now.offload:
        changed = model, batch, replace(now, offload=True)
        yield "gradient_checkpointing.offload: true", "same result; as much in pinned host memory", changed
    if size is not None and size > 1 and len(batch.lengths) > 1:
        rows = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        change = f"data.batch_size: {rows}, trainer.accumulate_grad_batches: {accumulate * size // rows}"
        yield change, "same result, a little slower", (model, batch.longest(rows), now)
    if budget is not None and longest <= budget // 2:
        change = f"data.tokens_per_batch: {budget // 2}, trainer.accumulate_grad_batches: {2 * accumulate}"
        half = batch.longest(math.ceil(len(batch.lengths) / 2))
        yield change, "nearly the same result, a little slower", (model, half, now)
    if (length := longest // 2) >= _SHORTEST:
        yield f"data.max_length: {length}", "longer rows are cut, see data.too_long", (model, batch.cut(length), now)
    if now.quantization in ("int8", "none"):
        built, autocasts = build("nf4", module.adapter_options)
        changed = built, batch, replace(now, quantization="nf4", double_quant=True, autocasts=autocasts)
        yield "model.quantization: nf4", "a base in 4 bits: small losses of quality", changed
    elif not now.double_quant:
        yield "model.double_quant: true", "next to nothing", (model, batch, replace(now, double_quant=True))
    if now.sharding is not None and now.sharding.offload is not True:
        changed = model, batch, replace(now, sharding=replace(now.sharding, offload=True))
        yield "trainer.strategy: ddp_sharded_offload", "same result; the base is copied twice a micro-batch", changed
    if now.optimizer is None:
        name = "bitsandbytes.optim.AdamW8bit"
        yield f"model.optimizer: {name}", "averages in 8 bits", (model, batch, replace(now, optimizer=name))
    options, layers = module.adapter_options, model.get_base_model().config.num_hidden_layers
    if module.adapter is None and not options["lora_options"]:
        smaller: list[tuple[str, Any, str]] = []
        if rank := options["rank"] // 2:
            smaller.append(("rank", rank, "a smaller adapter"))
        if options["layers"] == "all" and layers > 1:
            smaller.append(("layers", f"last:{layers // 2}", "trains the upper half of the layers only; faster"))
        for name, value, costs in smaller:
            built, autocasts = build(module.quantization, {**options, name: value})
            yield f"model.{name}: {value}", costs, (built, batch, replace(now, autocasts=autocasts))
