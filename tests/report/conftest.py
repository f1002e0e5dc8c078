"""Run folders as a fit leaves them, made by hand."""

import csv
import json
import math

import pytest
import yaml

from qlora_lightning.report import write_manifest

CONFIG = {
    "model": {"base": "package:tiny", "rank": 8, "learning_rate": 1e-3, "revision": None},
    "data": {"train": "rows.jsonl", "val": "val.jsonl", "batch_size": 4},
    "trainer": {"default_root_dir": "runs/a", "max_epochs": 1, "gradient_clip_val": 1.0},
}
MANIFEST = {
    **{"status": "finished", "error": None, "seed": 42, "python": "3.11.9", "platform": "Linux"},
    "base": {"base": "package:tiny", "fingerprint": "ab" * 32, "quantization": "nf4", "double_quant": True},
    "adapter": {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj"], "layers": [0, 1]},
    "parameters": {"trainable": 1000, "all": 50_000},
    "data": {
        "files": {"train": "rows.jsonl", "val": "val.jsonl"},
        "splits": {"train": {"rows": 12}, "val": {"rows": 7}},
        "description": "train: 12 rows, 400 tokens\n  2 rows dropped: empty answer",
        "hashes": {"train": "cd" * 32, "val": "ef" * 32},
    },
    "device": {
        **{"kind": "cpu", "name": "A CPU", "memory_gib": 16.0, "cores": 2, "threads": 2},
        **{"processes": 1, "nodes": 1, "strategy": "SingleDeviceStrategy", "precision": "32-true"},
    },
    "packages": {"torch": "2.13.0"},
    "git": "1234567890abcdef1234-dirty",
    "command": "qlora-lightning fit --config a.yaml",
    "reproduce": "qlora-lightning fit --config runs/a/config.yaml",
    "progress": {"steps": 20, "planned_steps": 40, "tokens": 2000, "labelled_tokens": 500, "seconds": 90.0},
    "best": {"monitor": "val_loss", "value": 0.5, "checkpoint": "step-000020.ckpt"},
    "attempts": [
        {"started": "2026-11-25T10:00:00+00:00", "seconds": 30.0, "from_step": 0, "to_step": 8, "status": "stopped"},
        {"started": "2026-11-25T11:00:00+00:00", "seconds": 60.0, "from_step": 8, "to_step": 20, "status": "finished"},
    ],
}
EVALUATION = {
    "rows": 1,
    "metrics": {
        "loss": {"base": {"value": 2.0}, "adapter": {"value": 0.45}, "difference": {"value": -1.55}},
        "token_accuracy": {"base": {"value": 0.4}, "adapter": {"value": 0.9}, "difference": {"value": 0.5}},
    },
    "samples": [{"prompt": "One?", "expected": "1", "base": "one", "adapter": "1"}],
}


def write_adapter(run):
    """Write what tells that a run folder has an adapter."""
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "qlora_lightning.json").write_text("{}")


def write_run(folder, steps=20, config=CONFIG, tokens_per_step=100, evaluation=EVALUATION, **changes):
    """Write a run folder of so many steps, with a validation every ten; return the folder."""
    write_adapter(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "metrics.csv").open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        names = ("step", "train_loss", "grad_norm", "learning_rate", "tokens_per_second", "tokens_seen", "peak_rss_gib")
        writer.writerow([*names, "epoch", "val_loss", "val_perplexity"])
        for step in range(steps):
            seen = tokens_per_step * (step + 1)
            writer.writerow([step, 2 - step / steps, 3.0, 1e-3, 50 + step, seen, 1.25, 0, "", ""])
            if step % 10 == 9:
                loss = 1.5 - step / steps
                writer.writerow([step, *[""] * 6, 0, loss, math.exp(loss)])
    write_manifest(folder, {**MANIFEST, "config": config, **changes})
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def make_run(tmp_path):
    return lambda name="a", **changes: write_run(tmp_path / "runs" / name, **changes)
