"""The plan as JSON and as tables."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.base.tensors import format_bytes
from qlora_lightning.commands.plan.knobs import Knob
from qlora_lightning.commands.plan.picture import draw_model
from qlora_lightning.commands.plan.run_length import RunLength
from qlora_lightning.model.memory.plan import PARTS, STORAGES, BaseShape, MemoryPlan, count_trained

_GIB = 2**30
_BAR = 16  # characters


@dataclass(frozen=True)
class Device:
    """Whose memory is planned.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        memory: Bytes that it has.
        named: Whether the user named them.
    """

    kind: str
    memory: int
    named: bool

    @property
    def words(self) -> str:
        """Name it."""
        kind = "a GPU" if self.kind == "cuda" else "a CPU"
        return f"{kind} with {_gib(self.memory)}" if self.named else f"this machine's {_gib(self.memory)}"


@dataclass(frozen=True)
class Plan:
    """All that is shown.

    Attributes:
        base: ``model.base``.
        origin: Where its config comes from.
        storage: How it is stored.
        model: Base and adapters without numbers.
        shape: Of the base.
        dtype: Of the products.
        memory: By part.
        device: Where it shall run.
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

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.memory.peak_bytes <= self.device.memory


def summarize(plan: Plan) -> dict[str, Any]:
    """Gather all figures, in bytes, in the form of the JSON."""
    epoch = plan.run.epoch
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
        "device": asdict(plan.device),
        "memory": {"parts": plan.memory.parts, "peak_bytes": plan.memory.peak_bytes, "fits": plan.fits},
        "largest_batch": {
            "rows": len(plan.run.batch.lengths),
            "tokens": plan.run.batch.tokens,
            "longest": max(plan.run.batch.lengths),
            "labelled": plan.run.batch.labelled,
        },
        "knobs": [asdict(knob) for knob in plan.knobs],
        "run": None if epoch is None else {"steps": epoch.all_steps, "tokens": plan.run.tokens, "epoch": asdict(epoch)},
        "notes": plan.notes,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Print picture and tables."""
    console.print(Text.assemble((plan.base, "bold"), f", by {plan.origin}"))
    console.print(draw_model(plan.model))
    console.print(_sizes(plan))
    console.print(_memory(plan))
    _print_verdict(plan, console)
    if plan.knobs:
        console.print(_knobs(plan))
    console.print(_run(plan))
    for note in plan.notes:
        console.print(Text(note))


def _sizes(plan: Plan) -> Table:
    base, trained = plan.shape.parameters, count_trained(plan.model)
    table = _table(f"The base, {base:,} parameters", "stored as", "bytes", "")
    for storage in STORAGES:
        here = Text("← this config" if storage == plan.storage else "", "green")
        table.add_row(storage, format_bytes(plan.shape.count_bytes(storage)), here)
    table.add_section()
    share = f"{trained:,} parameters ({trained / (base + trained):.2%}), float32"
    table.add_row("adapters", format_bytes(4 * trained), share)
    table.columns[2].justify = "left"
    table.caption = "int8 and nf4: the linears of the layers, embedding, norms and head in bf16"
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of a step", "part", "bytes", "", "")
    for column in table.columns[2:]:
        column.justify = "left"
    peak = plan.memory.peak_bytes
    for part, size in plan.memory.parts.items():
        if not size:
            continue
        what = PARTS[part]
        if part == "base" and plan.storage not in ("fp32", "bf16"):
            what = f"frozen: {plan.storage.split(',')[0]}, the rest {str(plan.dtype).removeprefix('torch.')}"
        elif part == "process" and plan.device.kind == "cuda":
            what = "CUDA's context, an estimate"
        table.add_row(part, format_bytes(size), Text("█" * round(_BAR * size / peak), "cyan"), Text(what, "dim"))
    table.add_section()
    table.add_row("peak", format_bytes(peak), "", _gib(peak))
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    peak, room = plan.memory.peak_bytes, plan.device.memory
    unread = plan.run.why_not is not None
    longest = " for the longest possible batch, since the data were not read" if unread else ""
    words = f"{_gib(peak)} of {plan.device.words}{longest}"
    if plan.fits:
        console.print(Text.assemble(("It fits", "bold green"), f": {words}, {_gib(room - peak)} to spare."))
    else:
        console.print(Text.assemble(("It does not fit", "bold red"), f": {words}, {_gib(peak - room)} too much."))


def _knobs(plan: Plan) -> Table:
    table = _table("What one change would save", "change", "saves", "costs")
    table.columns[0].no_wrap = False
    table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    for knob in plan.knobs:
        table.add_row(knob.change, format_bytes(knob.saves), knob.costs)
    return table


def _run(plan: Plan) -> Table:
    run, epoch = plan.run, plan.run.epoch
    table = _table("The run", "", "")
    rows = len(run.batch.lengths)
    whose = "the largest" if epoch is not None else "at most, as the settings allow"
    table.add_row("micro-batch", f"{run.batch.tokens:,} tokens in {rows:,} row{'s' * (rows != 1)}, {whose}")
    if epoch is None:
        table.add_row("steps, tokens", "unknown: the data were not read")
        table.columns[1].justify = "left"
        return table
    steps = "no end: set trainer.max_steps" if epoch.all_steps is None else f"{epoch.all_steps:,}"
    table.add_row("optimizer steps", steps)
    per_step = epoch.accumulate * epoch.devices * epoch.mean_tokens
    table.add_row("tokens of a step", f"{per_step:,.0f} on average")
    if run.tokens is not None:
        table.add_row("tokens of the run", f"{run.tokens:,}")
    table.columns[1].justify = "left"
    return table


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any((first, *others)))
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
