"""A plan as JSON, as tables, and as a picture of the model with what is adapted."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from peft.tuners.lora import LoraLayer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.commands.epoch import Epoch
from qlora_lightning.model.adapters.lora import ADAPTER
from qlora_lightning.model.batch import BatchShape
from qlora_lightning.model.memory.plan import PARTS, STORAGES, BaseShape, MemoryPlan, count_trained

_BAR = 16  # characters
_ADAPTED = "green"


class Device(NamedTuple):
    """Whose memory is planned: ``cpu`` or ``cuda``, bytes, and whether the user named them."""

    kind: str
    memory: int
    named: bool


class Knob(NamedTuple):
    """A change of one setting: what to type, bytes that it saves at the peak, what it costs in words."""

    change: str
    saves: int
    costs: str


@dataclass(frozen=True)
class RunLength:
    """What a run trains on.

    Attributes:
        batch: The largest micro-batch, or the largest that the settings allow.
        epoch: One epoch, and the steps of the run; ``None`` if the data were not read.
        tokens: Tokens of all optimizer steps; ``None`` if nobody knows.
        batch_lengths: How many numbers of tokens the micro-batches have, as far as it matters.
        ids: Token ids of all training rows that were read.
        why_not: Why they were not, in a sentence.
    """

    batch: BatchShape
    epoch: Epoch | None = None
    tokens: int | None = None
    batch_lengths: int = 1
    ids: Any = None
    why_not: str | None = None


@dataclass(frozen=True)
class Plan:
    """All that is shown.

    Attributes:
        base: ``model.base``.
        origin: Where its config comes from.
        storage: How it is stored.
        model: Base and adapters without numbers.
        shape: Shape of the base.
        dtype: Dtype of the products.
        memory: Memory by part.
        device: Where it is to run.
        knobs: What changes would save.
        run: Steps and tokens.
        notes: What else there is to say.
    """

    base: str
    origin: str
    storage: str
    model: Any
    shape: BaseShape
    dtype: Any
    memory: MemoryPlan
    device: Device
    knobs: list[Knob]
    run: RunLength
    notes: list[str]


def summarize(plan: Plan) -> dict[str, Any]:
    """Return all figures, in bytes, in the form of the JSON."""
    epoch, peak = plan.run.epoch, plan.memory.peak_bytes
    return {
        "base": {
            "name": plan.base,
            "config": plan.origin,
            "stored": plan.storage,
            "parameters": plan.shape.parameters,
            "bytes": {storage: plan.shape.count_bytes(storage) for storage in STORAGES},
        },
        "adapters": {"parameters": count_trained(plan.model)},
        "compute_dtype": str(plan.dtype).removeprefix("torch."),
        "device": plan.device._asdict(),
        "memory": {"parts": plan.memory.parts, "peak_bytes": peak, "fits": peak <= plan.device.memory},
        "largest_batch": {
            "rows": len(plan.run.batch.lengths),
            "tokens": plan.run.batch.tokens,
            "longest": max(plan.run.batch.lengths),
            "labelled": plan.run.batch.labelled,
        },
        "knobs": [knob._asdict() for knob in plan.knobs],
        "run": None if epoch is None else {"steps": epoch.all_steps, "tokens": plan.run.tokens, "epoch": asdict(epoch)},
        "notes": plan.notes,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Print picture and tables."""
    console.print(Text.assemble((plan.base, "bold"), f", by {plan.origin}"))
    console.print(draw_model(plan.model))
    console.print(_sizes(plan))
    console.print(_memory(plan))
    peak, device = plan.memory.peak_bytes, plan.device
    kind = "a GPU" if device.kind == "cuda" else "a CPU"
    whose = f"{kind} with {_gib(device.memory)}" if device.named else f"this machine's {_gib(device.memory)}"
    longest = " for the longest possible batch, since the data were not read" if plan.run.why_not else ""
    fits = peak <= device.memory
    verdict = ("It fits", "bold green") if fits else ("It does not fit", "bold red")
    rest = f"{_gib(abs(device.memory - peak))} {'to spare' if fits else 'too much'}"
    console.print(Text.assemble(verdict, f": {_gib(peak)} of {whose}{longest}, {rest}."))
    if plan.knobs:
        table = Table("change", "saves", "costs", title="What one change would save", title_justify="left")
        table.columns[1].justify = "right"
        for knob in plan.knobs:
            table.add_row(knob.change, format_bytes(knob.saves), knob.costs)
        console.print(table)
    console.print(_run(plan.run))
    for note in plan.notes:
        console.print(Text(note))


def _sizes(plan: Plan) -> Table:
    base, trained = plan.shape.parameters, count_trained(plan.model)
    table = Table("stored as", "bytes", "", title=f"The base, {base:,} parameters", title_justify="left")
    table.columns[1].justify = "right"
    for storage in STORAGES:
        here = Text("← this config" if storage == plan.storage else "", "green")
        table.add_row(storage, format_bytes(plan.shape.count_bytes(storage)), here)
    table.add_section()
    share = f"{trained:,} parameters ({trained / (base + trained):.2%}), float32"
    table.add_row("adapters", format_bytes(4 * trained), share)
    table.caption = "int8 and nf4: the linears of the layers, embedding, norms and head in bf16"
    return table


def _memory(plan: Plan) -> Table:
    table = Table("part", "bytes", "", "", title="Memory of a step", title_justify="left")
    table.columns[1].justify = "right"
    peak, dtype = plan.memory.peak_bytes, str(plan.dtype).removeprefix("torch.")
    told = {}
    if plan.storage not in ("fp32", "bf16"):
        told["base"] = f"frozen: {plan.storage.split(',')[0]}, the rest {dtype}"
    if plan.device.kind == "cuda":
        told["process"] = "CUDA's context, an estimate"
    for part, size in plan.memory.parts.items():
        if size:
            bar = Text("█" * round(_BAR * size / peak), "cyan")
            table.add_row(part, format_bytes(size), bar, Text(told.get(part, PARTS[part]), "dim"))
    table.add_section()
    table.add_row("peak", format_bytes(peak), "", _gib(peak))
    return table


def _run(run: RunLength) -> Table:
    table = Table(title="The run", title_justify="left", show_header=False)
    epoch, rows = run.epoch, len(run.batch.lengths)
    whose = "at most, as the settings allow" if epoch is None else "the largest"
    table.add_row("micro-batch", f"{run.batch.tokens:,} tokens in {rows:,} row{'s' * (rows != 1)}, {whose}")
    if epoch is None:
        table.add_row("steps, tokens", "unknown: the data were not read")
        return table
    steps = "no end: set trainer.max_steps" if epoch.all_steps is None else f"{epoch.all_steps:,}"
    table.add_row("optimizer steps", steps)
    table.add_row("tokens of a step", f"{epoch.accumulate * epoch.devices * epoch.mean_tokens:,.0f} on average")
    if run.tokens is not None:
        table.add_row("tokens of the run", f"{run.tokens:,}")
    return table


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw_model(model: Any) -> Panel:
    """Draw embedding, decoder layers, norm and head; adapted linears in green, with the shapes of A and B."""
    inner = model.get_base_model()
    config, layers = inner.config, inner.model.layers
    title = f"{len(layers)} × decoder layer, {config.num_attention_heads} heads over {config.num_key_value_heads}"
    tied = Text("  tied to embed_tokens" if config.tie_word_embeddings else "", "dim")
    down = Text("     │")
    return Panel(
        Group(
            Text.assemble(("embed_tokens  ", "bold"), _describe(inner.model.embed_tokens)),
            down,
            Panel(_draw_layer(layers, config), title=title, title_align="left", expand=False),
            down,
            Text.assemble(("RMSNorm       ", "bold"), _describe(inner.model.norm)),
            Text.assemble(("lm_head       ", "bold"), _describe(inner.lm_head), tied),
        ),
        title=f"LLaMA, {config.hidden_size:,} wide",
        title_align="left",
        expand=False,
    )


def _draw_layer(layers: Any, config: Any) -> Table:
    drawing = Table.grid(padding=(0, 2, 0, 0))
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
    blocks = (
        ("attention", "self_attn", "qkvo", f"head width {config.head_dim}, rotary θ {theta:,.0f}"),
        ("SwiGLU MLP", "mlp", ("gate", "up", "down"), "down(silu(gate) · up)"),
    )
    for block, parent, names, note in blocks:
        drawing.add_row(Text("RMSNorm", "bold"), Text(f"{config.hidden_size:,}"), "")
        drawing.add_row(Text(block, "bold"), "", Text(note, "dim"))
        for name in names:
            linears = [layer.get_submodule(f"{parent}.{name}_proj") for layer in layers]
            drawing.add_row(Text(f"  {name}_proj"), *_draw_linear(linears))
        drawing.add_row(Text("  + residual", "dim"), "", "")
    return drawing


def _draw_linear(linears: Sequence[Any]) -> tuple[Text, Text]:
    """Return the shape of a linear, and the adapter on it with the layers that have it."""
    inputs, outputs = linears[0].in_features, linears[0].out_features
    shape = Text(f"{inputs:,} → {outputs:,}")
    ranks = {number: linear.r[ADAPTER] for number, linear in enumerate(linears) if isinstance(linear, LoraLayer)}
    if not ranks:
        return shape, Text("frozen", "dim")
    numbers = ", ".join(str(rank) for rank in sorted(set(ranks.values())))
    where = "" if len(ranks) == len(linears) else f", layers {_name_ranges(ranks)}"
    return shape, Text(f"A {numbers} × {inputs:,}, B {outputs:,} × {numbers}{where}", _ADAPTED)


def _name_ranges(numbers: Iterable[int]) -> str:
    """Write ascending numbers shortly: ``0, 4–7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges)


def _describe(module: Any) -> Text:
    adapted = isinstance(module, LoraLayer)
    base = module.get_base_layer() if adapted else module
    trains = any(parameter.requires_grad for parameter in module.parameters())
    words = " × ".join(f"{size:,}" for size in base.weight.shape) if hasattr(base, "weight") else ""
    if adapted:
        return Text(f"{words}  adapter of rank {module.r[ADAPTER]}", _ADAPTED)
    return Text(f"{words}  trains", _ADAPTED) if trains else Text(words)
