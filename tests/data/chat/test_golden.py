"""Families of chat templates: each file of `golden` holds rows and what is trained of them, in ⟦ ⟧.

A section is a row in JSON, with the settings of the data module, and below it its samples, or why it is rejected; `↵`
is a newline of the text. `python -m tests.data.chat.test_golden` writes the files again: read what changed.
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import pytest

from qlora_lightning import UserError
from tests.data.conftest import make_families, prepare_rows
from tests.packed import unpack

FOLDER = Path(__file__).parents[1] / "golden"
FILES = sorted(FOLDER.glob("*.txt"))


def show(tokenizer, ids, labels):
    """The text of a sample, what is trained of it in brackets."""
    shown, end = "", 0
    for labelled, run in groupby(label != -100 for label in labels):
        start, end = end, end + len(list(run))
        # by itself sentencepiece would drop the first space of a run
        text = tokenizer.decode(ids[:end])[len(tokenizer.decode(ids[:start])) :]
        shown += f"⟦{text}⟧" if labelled else text
    return shown.replace("\n", "↵\n")


def render(tokenizer, header):
    row = json.loads(header)
    settings = row.pop("settings", {})
    try:
        data = prepare_rows([row], tokenizer, **settings)
    except UserError as error:
        return f"rejected: {str(error).splitlines()[1].partition(': ')[2]}"
    samples = [show(data.tokenizer, *sample) for sample in unpack(data.samples["train"])]
    return "\n---\n".join(text.removesuffix("\n") for text in samples)


def sections(file):
    parts = file.read_text(encoding="utf-8").removeprefix("row: ").split("\n\nrow: ")
    return [tuple(part.strip("\n").split("\n", maxsplit=1)) for part in parts]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_trained(families, file):
    for header, expected in sections(file):
        assert render(families[file.stem], header) == expected, header


def test_no_family_is_missing(families):
    assert {file.stem for file in FILES} == set(families)


def write_again():
    """Write every file as the code renders its rows now."""
    families = make_families()
    for file in FILES:
        parts = [f"row: {header}\n{render(families[file.stem], header)}" for header, *_ in sections(file)]
        file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_again())
