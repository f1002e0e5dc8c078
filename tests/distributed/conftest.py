"""What the tests of several processes share: a folder to run in."""

from pathlib import Path

import pytest
import yaml

from tests.distributed.runs import CONFIG
from tests.rows import counting_rows, write_rows


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory) -> Path:
    """A folder with the tiny base, 16 ragged rows, the first 9 of them, and a config for two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "tiny").symlink_to(tiny_base)
    rows = counting_rows()
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "nine.jsonl", rows[:9])
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    pairs = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": "No. " * (n % 3 + 1)}
        for n, row in enumerate(rows[:9])
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    model = {"class_path": "qlora_lightning.PreferenceModule", **CONFIG["model"]}
    data = {"class_path": "qlora_lightning.PreferenceDataModule", "train": "pairs.jsonl", "val": "pairs.jsonl"}
    (folder / "pairs.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model, "data": data, "evaluation": None}))
    return folder
