"""The page of qlora_lightning/data runs: its configs on its rows, with SmolLM2's tokenizer."""

import json
import re
import sys
from itertools import groupby
from pathlib import Path

import pytest
import yaml

from qlora_lightning import InstructionDataModule, PreferenceDataModule
from qlora_lightning.data.rows.formats import FORMATS
from tests.errors import rejects
from tests.packed import unpack

PAGE = (Path(__file__).parents[2] / "qlora_lightning" / "data" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+) ?(\S*)\n(.*?)```", PAGE, flags=re.DOTALL)
CONFIGS = [text for language, _, text in BLOCKS if language == "yaml"]
# a block of tokens shows what the config before it trains
SHOWN = {
    config: text.strip()
    for place, (language, _, config) in enumerate(BLOCKS)
    if language == "yaml"
    for following, _, text in BLOCKS[place + 1 : place + 3]
    if following == "text"
}


def table_of(heading):
    """The rows of a table whose first column has this heading, as pairs of cells."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*?\n\n", PAGE, flags=re.MULTILINE | re.DOTALL)[0]
    return [re.split(r"(?<!\\) \| ", line.strip("| "), maxsplit=1) for line in table.splitlines()[2:] if line]


def row_of(cell):
    return json.loads(cell.strip("`").replace("\\|", "|"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with every file that the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as the command does
    before = set(sys.modules)
    for _, name, text in BLOCKS:
        if name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, encoding="cp1252" if name == "export.csv" else "utf-8")
    yield tmp_path
    for name in {"squad", "my_formats"} & (set(sys.modules) - before):
        del sys.modules[name]


def trained(data, number):
    """The text of a sample, what is trained in brackets."""
    sample = unpack(data.samples["train"])[number]
    runs = groupby(zip(*sample, strict=True), lambda token: token[1] != -100)
    texts = [(labelled, data.tokenizer.decode([token for token, _ in run])) for labelled, run in runs]
    return "".join(f"⟦{text}⟧" if labelled else text for labelled, text in texts).strip()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: re.search(r"([\w-]+)\.(?:json|csv)", config)[1])
def test_every_config_reads_the_rows_beside_it(config, folder, smol):
    settings = yaml.safe_load(config)["data"]
    data = InstructionDataModule(**settings, tokenizer=smol)
    data.setup("fit")
    report = data.reports["train"]
    assert report.bad_rows == 0
    assert report.dropped == {}
    assert report.unread_columns in ([], ["id", "title"])  # SQuAD's
    samples = [trained(data, number) for number in range(len(data.samples["train"]))]
    assert all("⟦" in text for text in samples)
    assert ("cp1252" in config) == ("Österreich" in "".join(samples))
    if config in SHOWN:
        assert "\n---\n".join(samples) == SHOWN[config]


@pytest.mark.parametrize(("name", "row"), table_of("`format:`"), ids=lambda cell: cell[:20].strip("`"))
def test_every_format_is_known_by_its_row(name, row, tmp_path, families, smol):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row_of(row)))
    name = name.strip("`")
    tokenizer = smol if name == "tokens" else families["qwen2_5"]  # whose ids the page shows; the other is quicker
    settings = {"format": "text" if name == "text" else "auto", "chat_template": "chatml"}
    data = InstructionDataModule(tmp_path / "rows.jsonl", tokenizer=tokenizer, **settings)
    data.setup("fit")
    assert data.reports["train"].formats == [name]
    assert data.reports["train"].unread_columns == []


def test_no_format_is_missing():
    assert {name.strip("`") for name, _ in table_of("`format:`")} == set(FORMATS)


@pytest.mark.parametrize(
    ("row", "source"), [*table_of("pair"), *table_of("labeled answer")], ids=lambda cell: cell[:20].strip("`")
)
def test_every_pair_of_answers_and_every_judged_answer_is_read_alike(row, source, tmp_path, families):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row_of(row)))
    data = PreferenceDataModule(tmp_path / "rows.jsonl", tokenizer=families["qwen2_5"])
    data.setup("fit")
    verdicts, answers = data.samples["train"].desirable, ["4<|im_end|>", "5<|im_end|>"]
    expected = answers if verdicts is None else [answers[0] if verdicts[0] else answers[1]]
    assert re.findall("⟦(.*?)⟧", trained(data, 0)) == expected


@pytest.mark.parametrize(("row", "why"), table_of("row"), ids=lambda cell: cell[:20].strip("`"))
def test_what_is_said_to_be_rejected_is(row, why, tmp_path, families):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row_of(row)))
    key = next((f"row.{name}" for name in ("rejected", "label", "images") if name in row_of(row)), "rows.bad")
    with rejects(key):
        InstructionDataModule(tmp_path / "rows.jsonl", tokenizer=families["qwen2_5"]).setup("fit")
    remedy = re.search(r"`columns: (.*?)`", why)
    if remedy:
        columns = yaml.safe_load(remedy[1])
        InstructionDataModule(tmp_path / "rows.jsonl", columns=columns, tokenizer=families["qwen2_5"]).setup("fit")
