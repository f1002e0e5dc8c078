"""What a data module takes from the cache, and what makes it prepare its rows anew."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from qlora_lightning.data import prepared_rows
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samples"


@pytest.fixture
def prepared(monkeypatch):
    """The splits that were prepared, rather than taken from the cache."""
    splits, prepare = [], prepared_rows.prepare_samples

    def record(rows, recipe, split, *arguments, **settings):
        splits.append(split)
        return prepare(rows, recipe, split, *arguments, **settings)

    monkeypatch.setattr(prepared_rows, "prepare_samples", record)
    return splits


@pytest.fixture
def setup(write, families, tmp_path):
    """Set a data module up; its tokenizer lies in the folder `tok`."""
    write("train.jsonl", [{"prompt": f"q{number}", "completion": "k"} for number in range(8)])
    write("val.jsonl", [{"prompt": "q1", "completion": "k"}])
    families["qwen25"].save_pretrained("tok")
    shutil.copy("tok/chat_template.jinja", "own.jinja")

    def setup(kind=InstructionDataModule, **kwargs):
        data = kind(**{"train": "train.jsonl", "val": "val.jsonl", "tokenizer": "tok"} | kwargs)
        data.setup("fit")
        return data

    return setup


def contents(data):
    return {
        split: ([sample.labels.tolist() for sample in samples], data.reports[split])
        for split, samples in data.samples.items()
    }


def test_the_second_time_samples_are_mapped_and_no_tokenizer_is_loaded(setup, prepared, monkeypatch):
    first = setup()
    assert prepared == ["train", "val"]
    monkeypatch.setattr(prepared_rows, "load_choice", lambda *arguments: pytest.fail("the tokenizer was loaded"))
    second = setup()
    assert prepared == ["train", "val"]
    assert contents(first) == contents(second)
    assert second.reports["val"].overlap_pairs == [("val.jsonl:1", "train.jsonl:2")]
    base = second.samples["train"].ids
    while not isinstance(base, np.memmap):
        base = base.base  # at its end None, which has no base
    rows = [row for batch in second.train_dataloader() for row in batch["row_ids"].tolist()]
    assert sorted(rows) == list(range(8))


@pytest.mark.parametrize(
    ("file", "old", "new", "anew"),
    [
        ("train.jsonl", "q1", "r1", ["train"]),
        ("tok/tokenizer.json", "}", "} ", ["train", "val"]),
        ("tok/tokenizer_config.json", "}", "} ", ["train", "val"]),
        ("own.jinja", "{", "{##}{", ["train", "val"]),
    ],
)
def test_a_changed_file_is_noticed(setup, prepared, file, old, new, anew):
    setup(chat_template="own.jinja")
    prepared.clear()
    text = Path(file).read_text(encoding="utf-8")
    Path(file).write_text(text.replace(old, new, 1), encoding="utf-8")
    setup(chat_template="own.jinja")
    assert prepared == anew


@pytest.mark.parametrize(
    "settings",
    [
        {"system": "Be brief."},
        {"max_length": 64},
        {"too_long": "split"},
        {"train_on": "last"},
        {"format": "prompt_completion"},
        {"columns": {"prompt": "prompt"}},
        {"chat_template": "own.jinja"},
    ],
)
def test_another_setting_is_prepared_anew_and_each_is_kept(setup, prepared, settings):
    setup()
    setup(**settings)
    assert prepared == ["train", "val"] * 2
    setup()
    setup(**settings)
    assert prepared == ["train", "val"] * 2


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"tokens_per_batch": 512}, {"on_bad_row": "skip"}])
def test_settings_that_change_no_sample_find_the_same(setup, prepared, settings):
    setup()
    setup(**settings)
    assert prepared == ["train", "val"]


def test_held_out_rows_are_divided_off_the_same_samples(setup, prepared):
    first = setup(val=None, val_fraction=0.25)
    second = setup(val=None, val_fraction=0.5)
    assert prepared == ["train"]
    assert (len(first.samples["val"]), len(second.samples["val"])) == (2, 4)


def test_bad_rows_are_refused_from_the_cache_too(setup, prepared, write):
    write("train.jsonl", [{"prompt": "q", "completion": "k"}, {"prompt": "q", "completion": ""}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"^1 row cannot be used:\n  train.jsonl:2: the answer"):
            setup()
    data = setup(on_bad_row="skip")
    assert prepared == ["train", "val"]
    assert (data.reports["train"].rows, len(data.samples["train"])) == (2, 1)


def test_what_a_function_of_the_users_makes_is_never_kept(setup, prepared, cache, tmp_path, monkeypatch):
    (tmp_path / "converting.py").write_text(
        "def convert(values):\n"
        "    turns = ('user', values['prompt']), ('assistant', values['completion'])\n"
        "    return [{'role': role, 'content': content} for role, content in turns]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        setup(format="converting.convert")
    assert prepared == ["train", "val"] * 2
    assert not cache.exists()


class Mine(InstructionDataModule):
    def load_rows(self, split):
        return [{"prompt": "q", "completion": "k"}] if split == "train" else []


def test_rows_from_elsewhere_are_never_kept(setup, prepared, cache):
    for _ in range(2):
        setup(Mine)
    assert prepared == ["train"] * 2
    assert not cache.exists()


def test_a_tokenizer_in_python_is_never_kept(setup, prepared, cache, characters):
    for _ in range(2):
        setup(tokenizer=characters)
    assert prepared == ["train", "val"] * 2
    assert not cache.exists()


def test_an_interrupted_preparation_leaves_nothing_that_counts(setup, prepared, monkeypatch, cache):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared_rows, "prepare_samples", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup()
    assert not any(path.is_dir() for path in cache.iterdir())
    assert len(setup().samples["train"]) == 8
    assert prepared == ["train", "val"]


def test_an_unwritable_cache_prepares_in_memory(setup, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "file"))
    data = setup(val=None)
    assert len(data.samples["train"]) == 8
    assert [record.levelname for record in caplog.records if "not kept" in record.message] == ["WARNING"]
    assert "train.jsonl (train)" in caplog.text
