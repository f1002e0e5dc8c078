"""Plans a config: its model without numbers, its batches, and the memory of a step."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from pydoc import locate
from typing import Any, cast

import peft
import torch
from huggingface_hub import try_to_load_from_cache
from lightning.pytorch.strategies import StrategyRegistry
from transformers import AutoConfig

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.base.find import is_hub_id, resolve_base
from qlora_lightning.base.folder import check_model_folder
from qlora_lightning.base.gguf import find_unpacked
from qlora_lightning.base.tensors import GIB, format_gib
from qlora_lightning.callbacks import GradientCheckpointing
from qlora_lightning.commands.epoch import Epoch, count_devices, plan_epoch, training_plan
from qlora_lightning.commands.recipes import recipes_folder
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.model.adapters.lora import count_parameters
from qlora_lightning.model.guards.checks import check_trainer
from qlora_lightning.model.load.build import check_quantization, meta_model
from qlora_lightning.model.load.machine import choose_compute_dtype, device_memory_gib
from qlora_lightning.model.memory.formula import build_step_memory
from qlora_lightning.model.memory.micro_batch_size import find_fit, usable_bytes
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.sharded import SHARDED_STRATEGIES, ShardedDDPStrategy
from qlora_lightning.model.step import forward
from qlora_lightning.model.step.batch import check_row_length
from qlora_lightning.model.step.layout import find_computed
from qlora_lightning.support.errors import UserError

_ON_A_CPU = ("base", "scales", "vocabulary", "adapters", "gradients", "optimizer")  # parts; all else is measured there
_SMALL = 1_000_000_000  # bytes of a GGUF that is unpacked for the tokenizer inside, which `fit` would do too


class _LocalRun(QLoRACLI):
    """Takes a tokenizer that is on this machine."""

    no_tokenizer: UserError | None = None

    def before_instantiate_classes(self) -> None:
        data = self.config["data"].get("init_args") or {}
        if "tokenizer" in data:
            try:
                data["tokenizer"] = _find_tokenizer(data["tokenizer"])
            except UserError as error:
                self.no_tokenizer = error


def plan_run(arguments: Sequence[str], memory: int | None) -> tuple[dict[str, Any], peft.PeftModel]:
    """Parse options as ``fit`` does, and plan what they describe: no Trainer, no weights, no run folder.

    Args:
        arguments: options of ``fit``.
        memory: bytes of the device, if the user names them.

    Returns:
        All figures, in bytes, as the JSON has them; and the model without numbers.
    """
    run = _LocalRun(arguments, with_trainer=False)
    module: Any = run.model
    data: Any = run.datamodule
    if not isinstance(module, QLoRAModule):
        raise UserError(f"model.class_path names {type(module).__name__}: plan knows QLoRAModule and its subclasses.")
    trainer, checkpointing = run.config["trainer"], GradientCheckpointing(**run.config["gradient_checkpointing"])
    notes: list[str] = []
    device = _choose_device(str(trainer["accelerator"]), memory)
    is_cuda = device["kind"] == "cuda"
    # a card that is not here is taken for one of this decade
    dtype_device = "meta" if is_cuda and not torch.cuda.is_available() else device["kind"]
    sharded_offload = _read_sharding(trainer)
    if sharded_offload is not None:
        check_trainer("32-true", ShardedDDPStrategy, module.quantization)
    config, origin = _find_config(module.base, module.revision, module.trust_remote_code)
    dtype = choose_compute_dtype(module.compute_dtype, torch.device(dtype_device), config.model_type)
    double_quant = check_quantization(config, module.quantization, module.double_quant, module.base)
    folder = None if module.adapter is None else find_adapter_folder(module.adapter)
    model = meta_model(config, dtype, module.quantization, folder, module.adapter_options, module.fast)

    skips_unlabelled = forward.skips_unlabelled(model.get_base_model(), module.neftune_alpha, fast=module.fast)
    epoch: Epoch | None = None
    batch = _largest_allowed(data)
    try:
        if run.no_tokenizer is not None:
            raise run.no_tokenizer
        rows = _plan_batches(data)
        epoch = plan_epoch(rows, trainer)
        batch = _largest_batch(rows, epoch, skips_unlabelled)
    except UserError as error:
        epoch = None
        notes.append(f"The data were not read. {error}")
    check_row_length(config, data.max_length)
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and batch["longest"] > known:
        notes.append(
            f"Rows of up to {batch['longest']:,} tokens: the base was made for {known:,} (max_position_embeddings)."
        )
    for name in ("build_model", "compute_loss"):
        if module.overrides(name):
            notes.append(f"{type(module).__name__} has a {name} of its own: the plan is for the usual one.")

    step = build_step_memory(
        model,
        dtype,
        double_quant=double_quant,
        optimizer=module.optimizer_config,
        device_bytes=device["memory"],
        processes=(processes := count_devices(trainer)),
        sharded_offload=sharded_offload if is_cuda or sharded_offload is None else False,
    )
    size, choices = module.micro_batch_size, checkpointing.choices(is_cuda)
    longest = batch["longest"] if size.is_auto else max(batch["longest"], min(size.tokens, batch["computed"]))
    fit = find_fit(step, usable_bytes(device["memory"]), longest, choices)
    tokens = min(batch["computed"], (fit.tokens or longest) if size.is_auto and is_cuda else size.tokens)
    parts = fit.step.parts(max(tokens, batch["longest"]), batch["longest"])
    if not is_cuda:
        parts = {part: parts[part] for part in _ON_A_CPU}
    elif fit.step.offload:
        kept = format_gib(fit.step.host_bytes(max(tokens, batch["longest"])) - fit.step.host_base)
        notes.append(f"The inputs of checkpointed layers keep {kept} in pinned host memory.")
    if is_cuda:
        notes.append("Figures for GPUs are an estimate: no GPU has measured them.")
    trained, parameters = count_parameters(model)
    figures = {
        "base": {
            "name": module.base,
            "config": origin,
            "quantization": module.quantization,
            "parameters": parameters - trained,
        },
        "adapters": {"parameters": trained},
        "compute_dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "memory": {
            "parts": parts,
            "peak_bytes": sum(parts.values()) if is_cuda else None,
            "usable_bytes": round(usable_bytes(device["memory"])),
            "fits": fit.tokens > 0 if is_cuda else sum(parts.values()) <= device["memory"],
            "micro_batch_tokens": tokens,  # of the largest batch
            "most_tokens": fit.tokens if size.is_auto and is_cuda else size.tokens,
            "micro_batches": math.ceil(batch["computed"] / tokens),
            "gradient_checkpointing": fit.choice._asdict(),
            "host_bytes": step.host_base,
            "sharding": None if sharded_offload is None else {"processes": processes, "offload": sharded_offload},
        },
        "largest_batch": batch,
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


def _read_sharding(trainer: Any) -> bool | None:
    """Return what a sharded base offloads; ``None`` if the base is not sharded."""
    strategy = trainer["strategy"]
    if isinstance(strategy, str):
        if strategy not in ("auto", *StrategyRegistry.available_strategies()):
            raise UserError(f"trainer.strategy is {strategy}, which is no strategy, or has arguments that it lacks.")
        return SHARDED_STRATEGIES.get(strategy)
    if issubclass(cast(type, locate(strategy["class_path"])), ShardedDDPStrategy):
        return cast(bool, strategy["init_args"]["offload"])
    return None


# ---- batches ---------------------------------------------------------------------------------------------------------


def _plan_batches(data: Any) -> EpochPlan:
    """Read the training data, unless they are not on this machine; return their batches."""
    for source in [*data.sources("train"), *data.sources("val")]:
        if source.is_remote:
            raise UserError(f"{source.path} is not on this machine, and plan fetches nothing.")
    data.setup("fit")
    return training_plan(data)


def _largest_batch(plan: EpochPlan, epoch: Epoch, skips_unlabelled: bool) -> dict[str, int]:
    """Describe the batch with the most computed tokens: of unlabelled ones, and of shared beginnings, some are not."""
    samples = plan.samples

    def count(rows: Sequence[int]) -> int:
        if not skips_unlabelled:
            return int(samples.lengths[rows].sum())
        spans = samples.spans(rows)
        predicts = [samples.labelled[span][1:] for span in spans]  # from each token the next is predicted
        return find_computed([samples.ids[span] for span in spans], predicts).count

    rows = plan.find_largest(epoch.batches)
    if not rows:
        raise UserError("There are no training rows.")
    lengths = [span.stop - span.start for span in samples.spans(rows)]
    return _describe_batch(lengths, count(rows))


def _largest_allowed(data: Any) -> dict[str, int]:
    """Describe the largest batch that the settings allow: rows of ``max_length``."""
    if data.tokens_per_batch is None:
        lengths = [data.max_length] * data.batch_size
    else:
        whole, rest = divmod(data.tokens_per_batch, data.max_length)
        lengths = [data.max_length] * whole + [rest] * (rest > 0)
    return _describe_batch(lengths, sum(lengths))


def _describe_batch(lengths: Sequence[int], computed: int) -> dict[str, int]:
    return {"rows": len(lengths), "tokens": sum(lengths), "longest": max(lengths), "computed": computed}


# ---- config and tokenizer, without weights and without the network ---------------------------------------------------


def _find_folder(name: str, file: str, revision: str | None) -> Path | None:
    """Find the local folder with a file of a base; None if it would have to be fetched or unpacked."""
    if is_hub_id(name):
        found = try_to_load_from_cache(name, file, revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    path, _ = resolve_base(name, revision)
    return path if path.is_dir() else find_unpacked(path)


def _find_config(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, str]:
    """Return transformers' config of what ``model.base`` takes, and where it comes from.

    A hub id is looked up in the hub's local cache, then among the shapes that come with the recipes. Of a GGUF that is
    not unpacked yet only the header is read.
    """
    folder = _find_folder(name, "config.json", revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if folder is not None:
        check_model_folder(folder, name, weights=False)
        origin = str(folder / "config.json")
    elif is_hub_id(name):
        shapes = {file.parent.name: file.parent for file in sorted((recipes_folder() / "shapes").glob("*/config.json"))}
        shape = next((shape for shape in shapes if shape in name.lower()), None)  # Meta-Llama-3.1-8B-Instruct, …
        if shape is None:
            raise UserError(
                f"Base {name}: its config.json is not in the hub's local cache, and plan fetches nothing. Fetch it "
                f"with `hf download {name} config.json`, or name a folder with a config.json as model.base. Shapes "
                f"known without it: {', '.join(shapes)}."
            )
        folder, origin = shapes[shape], f"the shape of {shape} that comes with the package"
    else:
        file, _ = resolve_base(name, revision)
        folder, options, origin = file.parent, {"gguf_file": file.name}, f"the header of {file.name}"
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, **options), origin
    except Exception as error:  # each check of transformers, gguf and numpy raises a class of its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"Base {name}: transformers cannot use the config in {folder}: {reason}") from error


def _find_tokenizer(choice: Any) -> Any:
    """Turn ``data.tokenizer`` into a choice that is loaded without fetching anything, or unpacking a large file."""
    settings = choice if isinstance(choice, dict) else {"name": choice}
    name, revision = settings.get("name"), settings.get("revision")
    if not isinstance(name, str):
        return choice
    folder = _find_folder(name, "tokenizer.json", revision)
    if folder is not None:
        return {**settings, "name": str(folder), "revision": None}
    if is_hub_id(name):
        raise UserError(f"The tokenizer of {name} is not in the hub's local cache, and plan fetches nothing.")
    file, _ = resolve_base(name, revision)
    if file.stat().st_size > _SMALL:
        raise UserError(f"The tokenizer is inside {file.name}, which `fit` unpacks first.")
    return choice
