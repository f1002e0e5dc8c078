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
from qlora_lightning.model.memory.fit import REMEDIES
from qlora_lightning.model.memory.formula import Checkpointing


def print_plan(plan: Mapping[str, Any], model: Any, console: Console) -> None:
    """Print the figures of a plan and its model."""
    base, trained = plan["base"], plan["adapters"]["parameters"]
    console.print(Text.assemble((base["name"], "bold"), f", by {base['config']}"))
    console.print(_model_table(model))
    share = trained / (base["parameters"] + trained)
    console.print(f"{base['parameters']:,} parameters are frozen, {trained:,} train ({share:.2%}).")
    console.print(_memory_table(plan))
    console.print(_describe_fit(plan))
    if host := plan["memory"]["pinned_bytes"]:
        console.print(f"Each process keeps {format_bytes(host)} in host memory, pinned.")
    console.print(_run_table(plan))
    for note in plan["notes"]:
        console.print(Text(note))


def _memory_table(plan: Mapping[str, Any]) -> Table:
    parts, peak = plan["memory"]["parts"], plan["memory"]["peak_bytes"]
    total = sum(parts.values())
    table = Table("part", "bytes", "", title="Memory of a step, on each device", title_justify="left")
    for part, size in parts.items():
        if size:
            table.add_row(part, format_bytes(size), format_gib(size))
    table.add_section()
    table.add_row("in all" if peak is None else "peak", format_bytes(total), format_gib(total))
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
    run, batch, tokens = plan["run"], plan["largest_batch"], plan["memory"]["micro_batch_tokens"]
    table = Table(title="The run", title_justify="left", show_header=False)
    which = "at most, as the settings allow" if run is None else "the largest"
    table.add_row("batch", f"{batch['tokens']:,} tokens in {batch['rows']:,} rows, {which}")
    table.add_row("micro-batch", f"{tokens:,} tokens{'' if tokens < batch['tokens'] else ': the whole batch'}")
    if run is None:
        table.add_row("steps, tokens", "unknown: the data were not read")
        return table
    steps = run["steps"]
    table.add_row("optimizer steps", "no end: set trainer.max_steps" if steps is None else f"{steps:,}")
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
