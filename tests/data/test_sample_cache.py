"""What a data module takes from the cache, and what makes it prepare its rows again."""

import importlib
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

import qlora_lightning.data
from qlora_lightning import InstructionDataModule
from qlora_lightning.data.chat.renderer import ChatRenderer
from qlora_lightning.data.prepare import Preparation
from tests.errors import rejects


@pytest.fixture
def prepared(monkeypatch):
    """The splits that were prepared, rather than taken from the cache."""
    splits, prepare = [], Preparation.prepare

    def record(self, *settings):
        splits.append(self.split)
        return prepare(self, *settings)

    monkeypatch.setattr(Preparation, "prepare", record)
    return splits


@pytest.fixture
def setup(write, families, tmp_path, monkeypatch):
    """Set a data module up; its tokenizer is in the folder `tok`."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    write("train.jsonl", [{"prompt": f"q{number}", "completion": "k"} for number in range(8)])
    write("val.jsonl", [{"prompt": "q1", "completion": "k"}])
    families["qwen2_5"].save_pretrained("tok")
    Path("tok/generation_config.json").write_text('{"eos_token_id": 2}')
    shutil.copytree(Path(qlora_lightning.data.__file__).parent, "data")
    monkeypatch.setattr(qlora_lightning.data, "__file__", "data/__init__.py")
    Path("own.jinja").write_text("{# mine #}" + Path("tok/chat_template.jinja").read_text())

    def setup(stage="fit", kind=InstructionDataModule, **kwargs):
        data = kind(**{"train": "train.jsonl", "val": "val.jsonl", "tokenizer": "tok"} | kwargs)
        data.setup(stage)
        return data

    return setup


class TrainsTheLast(InstructionDataModule):
    @property
    def renderer(self):
        return ChatRenderer(self.tokenizer, train_on="last")


def test_samples_of_another_class_are_not_kept(setup, prepared):
    for kind in (TrainsTheLast, InstructionDataModule, InstructionDataModule):
        setup(kind=kind)
    assert prepared == ["train", "val"] * 2


def test_the_second_time_samples_are_mapped(setup, prepared):
    first = setup()
    second = setup()
    assert prepared == ["train", "val"]
    assert first.reports == second.reports
    for split, samples in first.samples.items():
        assert samples.content_hash == second.samples[split].content_hash
        assert samples.row_ids.tolist() == second.samples[split].row_ids.tolist()
    assert second.reports["val"].overlap_pairs == ["val.jsonl:1 = train.jsonl:2"]
    assert isinstance(second.samples["train"].ids.base, np.memmap)


@pytest.mark.parametrize(
    ("file", "old", "new", "again"),
    [
        ("train.jsonl", "q1", "r1", ["train"]),
        ("tok/tokenizer.json", '"normalizer": null', '"normalizer": {"type": "NFC"}', ["train", "val"]),
        ("tok/generation_config.json", "2", "[2, 0]", ["train", "val"]),
        ("own.jinja", "{", "{##}{", ["train", "val"]),
        ("data/rows/formats.py", "a", "b", ["train", "val"]),
        ("data/chat/chat_templates/chatml.jinja", "a", "b", ["train", "val"]),
    ],
)
def test_a_changed_file_is_noticed(setup, prepared, file, old, new, again):
    setup(chat_template="own.jinja")
    prepared.clear()
    text = Path(file).read_text(encoding="utf-8")
    Path(file).write_text(text.replace(old, new, 1), encoding="utf-8")
    setup(chat_template="own.jinja")
    assert prepared == again


def test_what_changes_samples_is_prepared_again_and_kept_and_what_does_not_finds_the_same(setup, prepared):
    settings = [{}, {"system": "Be brief."}, {"max_length": 64}, {"too_long": "split"}, {"train_on": "last"}]
    settings += [{"format": "prompt_completion"}, {"chat_template": "own.jinja"}, {"drop_answers": ["N/A"]}]
    for _ in range(2):
        for each in settings:
            setup(**each)
        assert prepared == ["train", "val"] * len(settings)
    prepared.clear()
    setup(tokens_per_batch=512, on_bad_row="skip")
    for fraction, rows in ((0.25, 2), (0.5, 4)):
        assert len(setup(val=None, val_fraction=fraction).samples["val"]) == rows
    for stage, files in (("validate", {}), ("test", {"test": "val.jsonl"}), ("test", {"test": "train.jsonl"})):
        data = setup(stage=stage, **files)
        assert [report.split for report in data.reports.values()] == list(data.samples)
    assert prepared == []


def test_bad_rows_are_rejected_from_the_cache_too(setup, prepared, write):
    odd = {"prompt": "q", "completion": "k", "\ud800": 1}  # half a character
    write("train.jsonl", [odd, {"prompt": "q", "completion": ""}])
    for _ in range(2):
        with rejects("rows.bad", "  train.jsonl:2: the answer"):
            setup()
    data = setup(on_bad_row="skip")
    assert prepared == ["train", "val"]
    assert (data.reports["train"].rows, len(data.samples["train"])) == (2, 1)


def test_rows_of_a_function_or_behind_a_url_are_never_kept(setup, prepared, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    role = "{'role': 'user', 'content': row['prompt']}, {'role': 'assistant', 'content': row['completion']}"
    Path("converting.py").write_text(f"def convert(row):\n    return [{role}]\n")
    convert = importlib.import_module("converting").convert
    with fsspec.open("memory://rows.jsonl", "wb") as file:
        file.write(Path("train.jsonl").read_bytes())
    for _ in range(2):
        setup(format="converting.convert")
        data = setup(format=lambda row: convert(row))
        assert data.identity["settings"]["format"].endswith("<lambda>")  # in a checkpoint, which holds no code
        assert len(setup(train="memory://rows.jsonl", val=None).samples["train"]) == 8
        assert prepared[-5:] == ["train", "val", "train", "val", "train"]
    assert not (tmp_path / "cache").exists()
