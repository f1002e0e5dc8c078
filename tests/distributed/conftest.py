"""What the tests of several processes share: a folder to run in."""

import json
from pathlib import Path

import pytest
import yaml

from tests.distributed.runs import CONFIG


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory) -> Path:
    """A folder with the tiny base, 16 ragged rows, the first 9 of them, and a config for two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "tiny").symlink_to(tiny_base)
    rows = [
        {"instruction": f"Count to {n}." + " Please." * (n % 4), "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, 17)
    ]
    for name, some in (("rows.jsonl", rows), ("nine.jsonl", rows[:9])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    pairs = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": "No. " * (n % 3 + 1)}
        for n, row in enumerate(rows[:9])
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    model = {"class_path": "qlora_lightning.PreferenceModule", **CONFIG["model"]}
    data = {"class_path": "qlora_lightning.PreferenceDataModule", "train": "pairs.jsonl", "val": "pairs.jsonl"}
    (folder / "pairs.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model, "data": data, "evaluation": None}))
    return folder
