"""A plan as tables: the model with what is adapted, bytes by storage and by part, changes, and the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from qlora_lightning.base.tensors import format_bytes, format_gib
from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.memory.plan import PARTS

_BAR = 16  # characters


def print_plan(plan: Mapping[str, Any], model: Any, console: Console) -> None:
    """Print the figures of a plan and its model."""
    base, device, peak = plan["base"], plan["device"], plan["memory"]["peak_bytes"]
    console.print(Text.assemble((base["name"], "bold"), f", by {base['config']}"))
    console.print(_model_table(model))
    console.print(_size_table(base, plan["adapters"]["parameters"]))
    console.print(_memory_table(plan))
    machine = "this machine" if not device["named"] else "a GPU" if device["kind"] == "cuda" else "a CPU"
    longest = " for the longest possible batch, since the data were not read" if plan["run"] is None else ""
    fits, rest = plan["memory"]["fits"], format_gib(abs(device["memory"] - peak))
    verdict = ("It fits", "bold green") if fits else ("It does not fit", "bold red")
    numbers = f"{format_gib(peak)} of {format_gib(device['memory'])} of {machine}{longest}"
    console.print(Text.assemble(verdict, f": {numbers}, {rest} {'to spare' if fits else 'too much'}."))
    if host := plan["memory"]["host_bytes"]:
        console.print(f"Each process keeps {format_bytes(host)} of the base in host memory, pinned.")
    if plan["changes"]:
        table = _table("What one change would save", "change", "saves", "costs")
        for change in plan["changes"]:
            table.add_row(change["change"], format_bytes(change["saves"]), change["costs"])
        console.print(table)
    console.print(_run_table(plan["run"], plan["largest_batch"]))
    for note in plan["notes"]:
        console.print(Text(note))


def _table(title: str, *headings: str) -> Table:
    table = Table(*headings, title=title, title_justify="left")
    table.columns[1].justify = "right"
    return table


def _size_table(base: Mapping[str, Any], trained: int) -> Table:
    table = _table(f"The base, {base['parameters']:,} parameters", "stored as", "bytes", "")
    for storage, size in base["bytes"].items():
        table.add_row(storage, format_bytes(size), Text("← this config" if storage == base["stored"] else "", "green"))
    table.add_section()
    share = trained / (base["parameters"] + trained)
    table.add_row("adapters", format_bytes(4 * trained), f"{trained:,} parameters ({share:.2%}), float32")
    table.caption = "int8 and nf4: the linears of the layers, embedding, norms and head in bf16"
    return table


def _memory_table(plan: Mapping[str, Any]) -> Table:
    parts, peak, stored = plan["memory"]["parts"], plan["memory"]["peak_bytes"], plan["base"]["stored"]
    meanings = dict(PARTS)
    if stored not in ("fp32", "bf16"):
        meanings["base"] = f"frozen: {stored.partition(',')[0]}, the rest {plan['compute_dtype']}"
    if plan["device"]["kind"] == "cuda":
        meanings["process"] = "CUDA's context, an estimate"
    sharding, title = plan["memory"]["sharding"], "Memory of a step"
    if sharding is not None:
        title += f", on each of {sharding['processes']} devices"
        meanings.update(gradients="of the adapters, float32, and DDP's copy of them")
    table = _table(title, "part", "bytes", "", "")
    for part, size in parts.items():
        if size:
            bar = Text("█" * round(_BAR * size / peak), "cyan")
            table.add_row(part, format_bytes(size), bar, Text(meanings[part], "dim"))
    table.add_section()
    table.add_row("peak", format_bytes(peak), "", format_gib(peak))
    return table


def _run_table(run: Mapping[str, Any] | None, batch: Mapping[str, Any]) -> Table:
    table = Table(title="The run", title_justify="left", show_header=False)
    which = "at most, as the settings allow" if run is None else "the largest"
    rows = f"{batch['rows']:,} row{'s' * (batch['rows'] != 1)}"
    table.add_row("micro-batch", f"{batch['tokens']:,} tokens in {rows}, {which}")
    if run is None:
        table.add_row("steps, tokens", "unknown: the data were not read")
        return table
    epoch, steps = run["epoch"], run["steps"]
    table.add_row("optimizer steps", "no end: set trainer.max_steps" if steps is None else f"{steps:,}")
    mean = epoch["accumulate"] * epoch["devices"] * epoch["mean_tokens"]
    table.add_row("tokens of a step", f"{mean:,.0f} on average")
    if steps is not None:
        table.add_row("tokens of the run", f"{run['tokens']:,}")
    return table


# ---- the model -------------------------------------------------------------------------------------------------------


def _model_table(model: Any) -> Table:
    """List embedding, the modules of a decoder layer, norm and head, with the adapter on each."""
    causal_lm = model.get_base_model()
    config, inner, layers = causal_lm.config, causal_lm.model, causal_lm.model.layers
    heads = f"{config.num_attention_heads} heads over {config.num_key_value_heads} of width {config.head_dim}"
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
    title = f"LLaMA, {config.hidden_size:,} wide, {heads}, rotary θ {theta:,.0f}"
    table = Table("module", "shape", "adapter", title=title, title_justify="left")

    def add(name: str, modules: Sequence[Any], shape: str | None = None) -> None:
        table.add_row(name, shape or _describe_shape(modules[0]), Text(_describe_adapter(modules), "green"))

    add("embed_tokens", [inner.embed_tokens])
    table.add_section()
    table.add_row(Text(f"{len(layers)} × decoder layer", "bold"))
    for name, module in layers[0].named_modules():
        if hasattr(module, "weight") and "base_layer" not in name and ".lora_" not in name:
            add(f"  {name}", [layer.get_submodule(name) for layer in layers])
    table.add_section()
    add("norm", [inner.norm])
    add("lm_head", [causal_lm.lm_head], "tied to embed_tokens" if config.tie_word_embeddings else None)
    return table


def _describe_shape(module: Any) -> str:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, nn.Linear):  # whose weight may be packed
        return f"{base.in_features:,} → {base.out_features:,}"
    return " × ".join(f"{size:,}" for size in base.weight.shape)


def _describe_adapter(modules: Sequence[Any]) -> str:
    """Describe what trains of one module of each layer: shapes of A and B, and which layers if not all."""
    adapted = [number for number, module in enumerate(modules) if isinstance(module, LoraLayer)]
    if not adapted:
        trains = any(parameter.requires_grad for parameter in modules[0].parameters())
        return "trains itself" if trains else ""
    first = modules[adapted[0]]
    rank = ", ".join(str(rank) for rank in sorted({modules[number].r[ADAPTER] for number in adapted}))
    shapes = f"A {rank} × {first.in_features:,}, B {first.out_features:,} × {rank}"
    if len(adapted) == len(modules):
        return shapes
    is_range = adapted == list(range(adapted[0], adapted[-1] + 1)) and len(adapted) > 1
    names = f"{adapted[0]} to {adapted[-1]}" if is_range else ", ".join(map(str, adapted))
    return f"{shapes}, layers {names}"
