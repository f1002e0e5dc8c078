import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lightning.data.rows.readers import RowReader, fingerprint
from qlora_lightning.data.rows.sources import Source
from qlora_lightning.support.errors import UserError

ROWS = [{"x": f"row {number}", "messages": [{"role": "user", "content": "é"}]} for number in range(600)]


@pytest.fixture(autouse=True)
def data_set(tmp_path, monkeypatch):
    """A folder that `datasets` reads as it reads one of the hub, without a network."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The environment may have been read before the session's fixture set it.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    Path("org/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), "org/data/train-0.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), "org/data/test-0.parquet")
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_numbered_and_taken_up_again(streaming):
    source = Source("org/data", split="train", streaming=streaming)
    rows = list(RowReader(source))
    assert [row.values for row in rows] == ROWS
    assert rows[16].where == "org/data:17"
    for count in (0, 1, 255, 256, 257, 599, 600):
        reader = RowReader(source)
        begin = list(itertools.islice(reader, count))
        assert begin + list(RowReader(source, reader.position())) == rows


def test_a_split_a_slice_of_one_named_files_and_the_first_rows_are_read():
    assert len(list(RowReader(Source("org/data", split="test")))) == 2
    assert len(list(RowReader(Source("org/data", split="train[:10%]")))) == 60
    assert len(list(RowReader(Source("org/data", split="train", data_files="test-0.parquet")))) == 2
    assert len(list(RowReader(Source("org/data", split="train", rows=300)))) == 300


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Source("org/data", split="validation"), "train"),
        (Source("org/data", split="train", name="main"), "main"),
        (Source("nobody/nothing", split="train"), "nobody/nothing"),
    ],
)
def test_what_is_not_there_is_refused_in_the_words_of_the_library(source, said):
    with pytest.raises(UserError) as error:
        list(RowReader(source))
    assert str(error.value).startswith(f"Data set {source.path}, which is no file or folder here, cannot be read")
    assert said in str(error.value).partition("hub: ")[2].partition(". Check path")[0]
    assert "\n" not in str(error.value)


def test_the_fingerprint_knows_content_and_split():
    before = fingerprint(Source("org/data", split="train"))
    assert before == fingerprint(Source("org/data", split="train"))
    assert before != fingerprint(Source("org/data", split="test"))
    pq.write_table(pa.Table.from_pylist(ROWS[:100]), "org/data/train-0.parquet")
    assert before != fingerprint(Source("org/data", split="train"))
