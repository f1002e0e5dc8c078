"""A plan as tables: the model with what is adapted, bytes by part, and the run."""

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.base.tensors import format_bytes, format_gib
from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.anatomy import LINEARS, decoder_layers, linear_sizes, names_of_ends
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
    if memory["peak_bytes"] is None:
        if not memory["fits"]:
            return Text.assemble(("It does not fit", "bold red"), f": {numbers}.")
        return Text(f"{numbers}; what a step adds on a CPU is not planned: `fit` measures and logs it.")
    if not memory["fits"]:
        return Text.assemble(
            ("It does not fit", "bold red"), f": {numbers}, of which a tenth is kept back. What is left: {REMEDIES}."
        )
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


# ---- the model -------------------------------------------------------------------------------------------------------


def _model_table(model: Any) -> Table:
    """List embedding, the modules of a decoder layer, and head, with the adapter on each."""
    causal_lm = model.get_base_model()
    config, layers = causal_lm.config, decoder_layers(causal_lm)
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    names = names_of_ends(causal_lm)
    title = f"{config.model_type}, {config.hidden_size:,} wide, {config.num_attention_heads} heads"
    if getattr(config, "num_key_value_heads", None) is not None:
        title += f" over {config.num_key_value_heads}"
    table = Table("module", "shape", "adapter", title=title, title_justify="left")

    def add(name: str, modules: Mapping[int, Any], shape: str | None = None) -> None:
        first = next(iter(modules.values()))
        table.add_row(name, shape or _describe_shape(first), Text(_describe_adapter(modules), "green"))

    add(names[ends[0]], {0: ends[0]})
    table.add_section()
    table.add_row(Text(f"{len(layers)} × decoder layer", "bold"))
    parts: dict[str, dict[int, Any]] = {}
    for number, layer in enumerate(layers):  # which may be of several kinds
        for name, module in layer.named_modules():
            if hasattr(module, "weight") and "base_layer" not in name and ".lora_" not in name:
                parts.setdefault(name, {})[number] = module
    for name, modules in parts.items():
        few = "" if len(modules) == len(layers) else f" ({len(modules)} layers)"
        add(f"  {name}{few}", modules)
    table.add_section()
    add(names[ends[1]], {0: ends[1]}, f"tied to {names[ends[0]]}" if ends[0].weight is ends[1].weight else None)
    return table


def _describe_shape(module: Any) -> str:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, LINEARS):  # whose weight may be packed
        return " → ".join(f"{size:,}" for size in linear_sizes(base))
    return " × ".join(f"{size:,}" for size in base.weight.shape)


def _describe_adapter(modules: Mapping[int, Any]) -> str:
    """Describe what trains of one module of each layer: shapes of A and B, and which layers if not all."""
    adapted = [number for number, module in modules.items() if isinstance(module, LoraLayer)]
    if not adapted:
        trains = any(each.requires_grad for module in modules.values() for each in module.parameters())
        return "trains itself" if trains else ""
    first = modules[adapted[0]]
    rank = ", ".join(str(rank) for rank in sorted({modules[number].r[ADAPTER] for number in adapted}))
    shapes = f"A {rank} × {first.in_features:,}, B {first.out_features:,} × {rank}"
    if len(adapted) == len(modules):
        return shapes
    is_range = adapted == list(range(adapted[0], adapted[-1] + 1)) and len(adapted) > 1
    names = f"{adapted[0]} to {adapted[-1]}" if is_range else ", ".join(map(str, adapted))
    return f"{shapes}, layers {names}"
