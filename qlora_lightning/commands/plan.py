"""``qlora-lightning plan``: what a config trains, with its memory and steps, before anything is loaded; a check."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.options import OptionParser, add_json_option, json_output, quiet_lightning
from qlora_lightning.commands.recipes import recipes_folder
from qlora_lightning.sources.folders import open_base, size_of_weights, stored_format
from qlora_lightning.sources.tensors import GIB, format_bytes, format_gib
from qlora_lightning.support.console import count_of, make_table, terminal
from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    from qlora_lightning.data.batches import EpochPlan

_DESCRIPTION = """Show the model of a config, and estimate its memory, steps and tokens before anything is loaded.

Pass the same config and options as to `fit`: --model.rank 16, --data.batch_size 4. Without --check, no weights are
read or downloaded, but a GGUF is unpacked once. The data are read if they are on this machine."""
_EPILOG = """examples:
  qlora-lightning plan --config configs/quickstart.yaml
  qlora-lightning plan --config configs/llama-3.1-8b.yaml --device-memory 16GiB --json plan.json
  qlora-lightning plan --config configs/quickstart.yaml --check

The report says whether a step fits, with how many tokens per micro-batch, and with or without gradient checkpointing.
The exit code is 1 if no step fits, or if --check finds a difference. GB are 10^9 bytes, GiB 2^30.

The device is the one in trainer.accelerator. `auto` means a GPU if there is one, or if you pass --device-memory. On a
CPU, only the memory that does not depend on the rows is planned."""
_CPU_PARTS = ("base", "scales", "vocabulary", "adapters", "gradients", "optimizer")  # `fit` measures all else
_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def main(argv: Sequence[str]) -> int:
    """Plan a config; return the exit code."""
    parser = OptionParser("plan", _DESCRIPTION, _EPILOG, fit=True)
    memory_help = "memory of the device, such as 16GiB or 24GB (default: that of this machine's GPU, or its RAM)"
    parser.add_argument("--device-memory", type=_read_size, metavar="SIZE", help=memory_help)
    check_help = "load the base, and compare our fused layers on this device with PEFT, transformers and torch"
    parser.add_argument("--check", action="store_true", help=check_help)
    add_json_option(parser)
    options, fit_options = parser.parse_known_args(argv)
    with json_output(options) as output, quiet_lightning():
        figures, model, module = _plan_run(fit_options, options.device_memory)
        _print_plan(figures, model, terminal())
        output.update(figures)
        is_right = True
        if options.check:
            output["check"] = _compare_on_device(module, figures["device"]["kind"], terminal())
            is_right = all(each["agrees"] for each in output["check"]["comparisons"])
        return 0 if figures["memory"]["fits"] and is_right else 1


def _read_size(text: str) -> int:
    """Read a number of bytes with a unit: ``16GiB``, ``24 GB``, ``81559 MiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mg]i?b)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size with its unit, such as 16GiB or 24GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _plan_run(arguments: Sequence[str], memory: int | None) -> tuple[dict[str, Any], Any, Any]:
    """Parse options of ``fit``, and plan that run, for a device with ``memory`` bytes if the user names them.

    Returns all figures, in bytes, as the JSON has them, the model on the meta device, and the module, without a model.
    """
    import torch

    from qlora_lightning.commands.fit import QLoRACLI
    from qlora_lightning.model.activation_checkpointing import GradientCheckpointing
    from qlora_lightning.model.adapters.inject import count_parameters
    from qlora_lightning.model.guards import check_trainer
    from qlora_lightning.model.load.machine import choose_compute_dtype
    from qlora_lightning.model.memory.fit import USABLE, find_fits, plan_step
    from qlora_lightning.model.sharded import SHARDED_STRATEGIES, ShardedDDPStrategy
    from qlora_lightning.model.step.packed import check_row_length

    run = QLoRACLI(arguments)
    module: Any = run.model
    data: Any = run.datamodule
    trainer = run.config["trainer"]
    notes: list[str] = []
    device = _choose_device(str(trainer["accelerator"]), memory)
    is_cuda = device["kind"] == "cuda"
    # a GPU that is not in this machine is assumed to be a recent one
    dtype_device = "meta" if is_cuda and not torch.cuda.is_available() else device["kind"]
    offload = SHARDED_STRATEGIES.get(str(trainer["strategy"]))  # None: the base is not sharded
    if offload is not None:
        check_trainer("32-true", ShardedDDPStrategy, module.quantization)
    config, origin, folder = _find_config(module.base, module.revision, module.trust_remote_code)
    dtype = choose_compute_dtype(module.compute_dtype, torch.device(dtype_device), config.model_type)
    offload = offload if is_cuda or offload is None else False

    samples, epoch = None, None
    n_rows = data.batch_size or max(1, data.tokens_per_batch // data.max_length)
    batch = {"rows": n_rows, "tokens": n_rows * data.max_length, "longest": data.max_length}  # the largest allowed
    try:
        for source in [*data.sources("train"), *data.sources("val")]:
            if source.is_remote:
                raise UserError(f"{source.path} is not on this machine, and plan fetches no data.")
        data.setup("fit")
        epoch_plan = data.plan_epochs()
        samples, epoch = epoch_plan.samples, plan_epoch(epoch_plan, trainer)
        rows, lengths = epoch_plan.find_largest(epoch.batches), samples.lengths
        batch = {"rows": len(rows), "tokens": int(lengths[rows].sum()), "longest": int(lengths.max())}
    except UserError as error:
        notes.append(f"The data were not read. {error}")
    model, step = plan_step(module, config, dtype, count_devices(trainer), offload, samples)
    check_row_length(config, data.max_length)
    for name in ("build_model", "compute_loss"):
        if module.overrides(name) and not type(module).__module__.startswith("qlora_lightning."):
            notes.append(f"{type(module).__name__} has a {name} of its own: the plan is for the usual one.")

    budget, usable = module.token_budget, USABLE * device["memory"]
    row_tokens = batch["longest"] if budget.is_auto else max(batch["longest"], min(budget.tokens, batch["tokens"]))
    choices = GradientCheckpointing(**run.config["gradient_checkpointing"]).choices(on_cuda=is_cuda)
    fit = find_fits(step, usable, row_tokens, choices)[0]
    tokens = min(batch["tokens"], (fit.tokens or row_tokens) if budget.is_auto and is_cuda else budget.tokens)
    pass_tokens = max(tokens, batch["longest"])
    parts = step.parts(pass_tokens, fit.choice)
    if is_cuda:
        notes.append("Figures for GPUs are an estimate: no GPU has measured them.")
        if not step.is_fused:
            notes.append("Layers of PEFT and transformers have no formula: what they keep is an estimate, chosen high.")
    else:
        parts = {part: parts[part] for part in _CPU_PARTS}
    n_trainable, n_parameters = count_parameters(model)
    figures = {
        "base": {
            "name": module.base,
            "config": origin,
            "quantization": module.quantization,
            "stored_as": stored_format(folder),
            "stored_bytes": size_of_weights(folder),  # what a download fetches
            "parameters": n_parameters - n_trainable,
        },
        "adapters": {"parameters": n_trainable},
        "compute_dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "memory": {
            "parts": parts,
            "peak_bytes": sum(parts.values()) if is_cuda else None,
            "usable_bytes": round(usable),
            "fits": fit.tokens > 0 if is_cuda else sum(parts.values()) <= device["memory"],
            "micro_batch_tokens": tokens,  # of the largest batch
            "most_tokens": fit.tokens if budget.is_auto and is_cuda else budget.tokens,
            "gradient_checkpointing": fit.choice._asdict(),
            "host_bytes": step.host_base,  # of the base
            "pinned_bytes": step.host_bytes(pass_tokens, fit.choice) if is_cuda else 0,  # of base and layers' inputs
        },
        "largest_batch": batch,
        "run": epoch and {"steps": epoch.all_steps, "tokens": epoch.all_tokens, "epoch": asdict(epoch)},
        "notes": notes,
    }
    return figures, model, module


def _choose_device(accelerator: str, memory: int | None) -> dict[str, Any]:
    """Choose the device to plan for; ``auto`` is CUDA if this machine has it, or if the user names its memory."""
    import torch

    from qlora_lightning.model.load.machine import device_memory_gib

    has_gpu = torch.cuda.is_available()
    is_cuda = has_gpu or memory is not None if accelerator == "auto" else accelerator != "cpu"
    if is_cuda and memory is None and not has_gpu:
        raise UserError(f"trainer.accelerator is {accelerator}, and there is no GPU here: add --device-memory 16GiB.")
    kind = "cuda" if is_cuda else "cpu"
    size = int(device_memory_gib(torch.device(kind)) * GIB) if memory is None else memory
    return {"kind": kind, "memory": size, "named": memory is not None}


def _compare_on_device(module: Any, kind: str, console: Console) -> dict[str, Any]:
    """Load the base onto the GPU of this machine, or its CPU; print what that computes fused beside the plain path."""
    import torch

    from qlora_lightning.model.self_check import compare_paths, library_versions, name_device

    device = torch.device("cuda", 0) if kind == "cuda" and torch.cuda.is_available() else torch.device("cpu")
    name = name_device(device)
    module.to(device)
    module.configure_model()
    dtype, versions = module.precision.dtype, library_versions()
    compared = compare_paths(module.causal_lm, dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    rows = [
        [each.part, each.name, f"{each.distance:.1e}", f"{each.limit:.1e}", "" if each.agrees else "disagrees"]
        for each in compared
    ]
    title = f"Fused against plain, relative distances: {name}, {dtype_name}"
    console.print(make_table(("part", "what", "distance", "allowed", ""), rows, title))
    console.print(Text(", ".join(f"{library} {version}" for library, version in versions.items())))
    comparisons = [{**each._asdict(), "agrees": each.agrees} for each in compared]
    return {
        "device": name,
        "compute_dtype": dtype_name,
        "versions": versions,
        "comparisons": comparisons,
    }


# ---- an epoch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """Size of an epoch of the training rows, and of the whole run."""

    batches: int  # on each device
    devices: int  # of all nodes, on which batches run side by side
    tokens: int  # of all rows
    steps: int  # optimizer steps per epoch
    all_steps: int | None  # of the run; None if nothing ends it
    all_tokens: int | None  # of the run, approximately


def plan_epoch(plan: EpochPlan, trainer: Mapping[str, Any]) -> Epoch:
    """Count epoch and run from a plan for one device, under the Trainer's settings with their defaults."""
    from qlora_lightning.support.trainer import limit_batches, steps_of_run

    devices = count_devices(trainer)
    batches = limit_batches(len(replace(plan, world_size=devices)), trainer["limit_train_batches"])
    steps = math.ceil(batches / trainer["accumulate_grad_batches"])
    all_steps = steps_of_run(steps, trainer["max_epochs"], trainer["max_steps"])
    batch_tokens = [int(plan.samples.lengths[batch.rows].sum()) for batch in plan.batches(0)]
    step_tokens = batches * devices * sum(batch_tokens) / max(1, len(batch_tokens) * steps)  # on average
    all_tokens = None if all_steps is None else round(all_steps * step_tokens)
    return Epoch(batches, devices, sum(batch_tokens), steps, all_steps, all_tokens)


def count_devices(trainer: Mapping[str, Any]) -> int:
    """Count the devices of all nodes that ``trainer.devices`` asks for: a number, a list, or all of this machine."""
    import torch

    devices = str(trainer["devices"])
    if devices in ("auto", "-1"):
        count = torch.cuda.device_count() if trainer["accelerator"] in ("auto", "gpu", "cuda") else 1
    else:
        count = int(devices) if devices.isdigit() else len(re.findall(r"\d+", devices))  # "0,1," or [0, 1]
    return max(1, count) * int(trainer["num_nodes"])


# ---- config without weights ------------------------------------------------------------------------------------------


def _find_config(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, str, Path]:
    """Return transformers' config of a ``model.base``, where it comes from, and its folder.

    A hub id that cannot be fetched is looked up among the shapes that come with the recipes.
    """
    from qlora_lightning.model.load.wrapped import open_text_config

    try:
        folder = open_base(name, revision, weights=False).folder
        origin = str(folder / "config.json")
    except UserError:
        # meta-llama/Meta-Llama-3.1-8B and Llama-3.1-8B-Instruct share a shape, phi-4 and Phi-4-mini do not
        shape_name = re.sub("^meta-|(-(instruct|it|base|text|v0[.]3|2507))+$", "", name.rpartition("/")[2].lower())
        shapes = (recipes_folder() / "shapes").glob("*/config.json")
        shape: Path | None = next((file for file in shapes if file.parent.name == shape_name), None)
        if shape is None or Path(name).expanduser().exists():
            raise
        folder, origin = shape.parent, f"the shape of {shape.parent.name} that comes with the package"
    return open_text_config(folder, name, trust_remote_code), origin, folder


# ---- tables ----------------------------------------------------------------------------------------------------------


def _print_plan(plan: Mapping[str, Any], model: Any, console: Console) -> None:
    """Print the figures of a plan and its model."""
    base, n_trainable, parts = plan["base"], plan["adapters"]["parameters"], plan["memory"]["parts"]
    run, batch, tokens = plan["run"], plan["largest_batch"], plan["memory"]["micro_batch_tokens"]
    console.print(Text.assemble((base["name"], "bold"), f", by {base['config']}"))
    if base["stored_bytes"]:
        stored_as = f" ({base['stored_as']})" if base["stored_as"] else ""
        console.print(f"Its files of weights have {format_bytes(base['stored_bytes'])}{stored_as}.")
    console.print(_model_table(model))
    share = n_trainable / (base["parameters"] + n_trainable)
    console.print(f"{base['parameters']:,} parameters are frozen, {n_trainable:,} train ({share:.2%}).")
    sizes = {**parts, "in all" if plan["memory"]["peak_bytes"] is None else "peak": sum(parts.values())}
    rows = [[part, format_bytes(size), format_gib(size)] for part, size in sizes.items() if size]
    console.print(make_table(("part", "bytes", ""), rows, "Memory of a step, on each device"))
    console.print(_describe_fit(plan))
    if host := plan["memory"]["pinned_bytes"]:
        console.print(f"Each process keeps {format_bytes(host)} in host memory, pinned.")
    kind = "at most, as the settings allow" if run is None else "the largest"
    rows = [
        ["batch", f"{batch['tokens']:,} tokens in {count_of(batch['rows'], 'row')}, {kind}"],
        ["micro-batch", f"{tokens:,} tokens{'' if tokens < batch['tokens'] else ': the whole batch'}"],
    ]
    if run is None:
        rows.append(["steps, tokens", "unknown: the data were not read"])
    elif run["steps"] is None:
        rows.append(["optimizer steps", "no end: set trainer.max_steps"])
    else:
        rows += [["optimizer steps", f"{run['steps']:,}"], ["tokens of the run", f"{run['tokens']:,}"]]
    console.print(make_table((), rows, "The run"))
    for note in plan["notes"]:
        console.print(Text(note))


def _describe_fit(plan: Mapping[str, Any]) -> Text:
    from qlora_lightning.model.activation_checkpointing import Checkpointing
    from qlora_lightning.model.memory.fit import list_remedies

    device, memory = plan["device"], plan["memory"]
    total = sum(memory["parts"].values())
    machine = "this machine" if not device["named"] else "a GPU" if device["kind"] == "cuda" else "a CPU"
    usage = f"{format_gib(total)} of {format_gib(device['memory'])} of {machine}"
    if not memory["fits"]:
        checkpoints = memory["gradient_checkpointing"]["checkpointed"]
        on_cuda = device["kind"] == "cuda"
        in_4_bits = plan["base"]["quantization"] in ("nf4", "fp4")
        remedies = list_remedies(in_4_bits=in_4_bits, checkpoints=checkpoints, on_cuda=on_cuda)
        details = f": {usage}. A tenth is kept back. What is left: {remedies}."
        return Text.assemble(("It does not fit", "bold red"), details)
    if memory["peak_bytes"] is None:
        return Text(f"{usage}; what a step adds on a CPU is not planned: `fit` measures and logs it.")
    limits = f", {Checkpointing(**memory['gradient_checkpointing'])}, up to {memory['most_tokens']:,} tokens at a time"
    assumption = " for rows of data.max_length, since the data were not read" if plan["run"] is None else ""
    return Text.assemble(("It fits", "bold green"), f"{limits}: {usage}{assumption}.")


def _model_table(model: Any) -> Table:
    """List the modules that carry an adapter, equal ones of several layers in one row."""
    from peft.tuners.lora import LoraLayer

    from qlora_lightning.model.adapters.inject import ADAPTER

    causal_lm = model.get_base_model()
    config, counts = causal_lm.config, Counter[tuple[str, ...]]()
    for name, module in causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            shape, rank = f"{module.in_features:,} → {module.out_features:,}", f"{module.r[ADAPTER]}"
            if weight := getattr(module, "parameter_name", None):  # of experts
                name = f"{name.removesuffix('.base_layer')}.{weight}"
            counts[re.sub(r".*\.\d+\.", "", name), shape, rank] += 1
    title = f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size:,} wide"
    rows = [[*cells, str(count)] for cells, count in counts.items()]
    return make_table(("adapter on", "shape", "rank", "layers"), rows, title)
