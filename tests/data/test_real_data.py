"""Every row of real data sets, where they lie beside the checkout: what is trained is the answer and its stop token."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_lightning import InstructionDataModule

FOLDER = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real data do not lie beside the checkout")


def read(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "rows", "key"),
    [
        ("alpaca_en_demo.json", 999, "output"),
        pytest.param("gsm8k_train.jsonl", 7473, "answer", marks=pytest.mark.slow),
        pytest.param("gsm8k_test.jsonl", 1319, "answer", marks=pytest.mark.slow),
    ],
)
def test_labelled_tokens_are_the_answer_and_its_stop_token(smol, name, rows, key):
    data = InstructionDataModule(train=str(FOLDER / name), tokenizer=smol)
    data.setup("fit")
    samples, answers = data.samples["train"], [row[key] for row in read(name)]
    assert len(samples) == rows == data.reports["train"].rows
    ids = [samples.ids[samples.starts[n] : samples.starts[n + 1]] for n in range(rows)]
    labelled = [samples.labelled[samples.starts[n] : samples.starts[n + 1]] for n in range(rows)]
    said = smol.batch_decode([row[mask].tolist() for row, mask in zip(ids, labelled, strict=True)])
    assert said == [f"{answer}<|im_end|>" for answer in answers]
    before = smol.batch_decode([row[: np.argmax(mask)].tolist() for row, mask in zip(ids, labelled, strict=True)])
    assert all(text.endswith("<|im_start|>assistant\n") for text in before)
