"""A plan as tables: what is adapted, bytes by part, and the run."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.base.tensors import format_bytes, format_gib
from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.memory.micro_batch_size import REMEDIES, Checkpointing

_BAR = 16  # characters
_PARTS = {
    "base": "frozen",
    "scales": "of the quantized weights",
    "vocabulary": "embedding and head",
    "gathered": "of the base, whole for a moment",
    "adapters": "float32",
    "gradients": "of the adapters, float32",
    "optimizer": "its state",
    "copies": "of the adapters, in the dtype of the products",
    "activations": "kept until backward",
    "workspace": "of the logits, or of one layer's backward",
    "context": "of CUDA and its libraries, an estimate",
}


def print_plan(plan: Mapping[str, Any], model: Any, console: Console) -> None:
    """Print the figures of a plan and its model."""
    base, trained = plan["base"], plan["adapters"]["parameters"]
    console.print(Text.assemble((base["name"], "bold"), f", by {base['config']}"))
    console.print(_model_table(model))
    share = trained / (base["parameters"] + trained)
    console.print(f"{base['parameters']:,} parameters are frozen, {trained:,} train ({share:.2%}).")
    console.print(_memory_table(plan))
    console.print(_describe_fit(plan))
    if host := plan["memory"]["host_bytes"]:
        console.print(f"Each process keeps {format_bytes(host)} of the base in host memory, pinned.")
    console.print(_run_table(plan))
    for note in plan["notes"]:
        console.print(Text(note))


def _memory_table(plan: Mapping[str, Any]) -> Table:
    parts, peak, base = plan["memory"]["parts"], plan["memory"]["peak_bytes"], plan["base"]
    meanings = dict(_PARTS)
    if base["quantization"] != "none":
        meanings["base"] = f"frozen: {base['quantization']}, the rest {plan['compute_dtype']}"
    sharding, title = plan["memory"]["sharding"], "Memory of a step"
    if sharding is not None:
        title += f", on each of {sharding['processes']} devices"
        meanings["gradients"] = "of the adapters, float32, and DDP's copy of them"
    table = Table("part", "bytes", "", "", title=title, title_justify="left")
    table.columns[1].justify = "right"
    total = sum(parts.values())
    for part, meaning in meanings.items():
        if size := parts.get(part, 0):
            bar = Text("█" * round(_BAR * size / total), "cyan")
            table.add_row(part, format_bytes(size), bar, Text(meaning, "dim"))
    table.add_section()
    table.add_row("in all" if peak is None else "peak", format_bytes(total), "", format_gib(total))
    return table


def _describe_fit(plan: Mapping[str, Any]) -> Text:
    device, memory = plan["device"], plan["memory"]
    total = sum(memory["parts"].values())
    machine = "this machine" if not device["named"] else "a GPU" if device["kind"] == "cuda" else "a CPU"
    numbers = f"{format_gib(total)} of {format_gib(device['memory'])} of {machine}"
    if not memory["fits"]:
        remedy = f". A tenth is kept back. What is left: {REMEDIES}"
        return Text.assemble(("It does not fit", "bold red"), f": {numbers}{remedy}.")
    if memory["peak_bytes"] is None:
        return Text(f"{numbers}; what a step adds on a CPU is not planned: `fit` measures and logs it.")
    how = f", {Checkpointing(**memory['gradient_checkpointing'])}, up to {memory['most_tokens']:,} tokens at a time"
    longest = " for rows of data.max_length, since the data were not read" if plan["run"] is None else ""
    return Text.assemble(("It fits", "bold green"), f"{how}: {numbers}{longest}.")


def _run_table(plan: Mapping[str, Any]) -> Table:
    run, batch, memory = plan["run"], plan["largest_batch"], plan["memory"]
    table = Table(title="The run", title_justify="left", show_header=False)
    which = "at most, as the settings allow" if run is None else "the largest"
    rows = f"{batch['rows']:,} row{'s' * (batch['rows'] != 1)}"
    table.add_row("batch", f"{batch['tokens']:,} tokens in {rows}, {which}")
    parts = f", about {memory['micro_batches']:,} a batch" if memory["micro_batches"] > 1 else ": the whole batch"
    table.add_row("micro-batch", f"{memory['micro_batch_tokens']:,} tokens{parts}")
    if run is None:
        table.add_row("steps, tokens", "unknown: the data were not read")
        return table
    epoch, steps = run["epoch"], run["steps"]
    table.add_row("optimizer steps", "no end: set trainer.max_steps" if steps is None else f"{steps:,}")
    batches = epoch["accumulate"] * epoch["devices"]
    mean, rows = batches * epoch["mean_tokens"], batches * epoch["mean_rows"]
    table.add_row("a step", f"{mean:,.0f} tokens in {rows:,.1f} rows on average")
    if steps is not None:
        table.add_row("tokens of the run", f"{run['tokens']:,}")
    return table


def _model_table(model: Any) -> Table:
    """List what carries an adapter, of equal modules of all layers once."""
    causal_lm = model.get_base_model()
    config, counts = causal_lm.config, Counter[tuple[str, ...]]()
    for name, module in causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            shape, rank = f"{module.in_features:,} → {module.out_features:,}", f"{module.r[ADAPTER]}"
            counts[re.sub(r".*\.\d+\.", "", name), shape, rank] += 1
    title = f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size:,} wide"
    table = Table("adapter on", "shape", "rank", "layers", title=title, title_justify="left")
    for cells, count in counts.items():
        table.add_row(*cells, str(count))
    return table
