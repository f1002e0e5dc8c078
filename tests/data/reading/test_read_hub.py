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


def refusal(**options):
    with pytest.raises(UserError) as error:
        list(RowReader(Source(**options)))
    return str(error.value)


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


def test_a_split_and_a_slice_of_one_are_read():
    assert len(list(RowReader(Source("org/data", split="test")))) == 2
    assert len(list(RowReader(Source("org/data", split="train[:10%]")))) == 60


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_split_or_name_lists_those_that_exist(streaming):
    split = refusal(path="org/data", split="validation", streaming=streaming)
    assert split == "Data set org/data has no split 'validation': name one of train, test with `split:`."
    name = refusal(path="org/data", split="train", name="main", streaming=streaming)
    assert name == "Data set org/data has no part 'main': name one of default with `name:`."


def test_a_data_set_of_several_parts_asks_for_one():
    Path("org/data/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: train-0.parquet\n"
        "- config_name: two\n  data_files: test-0.parquet\n---\n"
    )
    message = refusal(path="org/data", split="train")
    assert message == "Data set org/data has several parts: name one of one, two with `name:`."
    assert len(list(RowReader(Source("org/data", split="train", name="two")))) == 2


def test_an_unknown_data_set_is_refused_without_a_network():
    message = refusal(path="nobody/nothing", split="train")
    assert message.startswith("Data set nobody/nothing is no file or folder here, and not in the local cache")
    assert "HF_HUB_OFFLINE forbids the download" in message
    with pytest.raises(UserError, match="nobody/nothing is no file or folder here"):
        fingerprint(Source("nobody/nothing", split="train"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dataset 'org/data' doesn't exist on the Hub or cannot be accessed.", "not found on the Hugging Face hub"),
        ("Dataset 'org/data' is a gated dataset on the Hub.", "https://huggingface.co/datasets/org/data"),
        ("Revision 'v9' doesn't exist for dataset 'org/data' on the Hub.", "Revision 'v9' doesn't exist for dataset"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(monkeypatch, text, expected):
    import datasets

    def refuse(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError(text)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = refusal(path="org/data", split="train", revision="v9")
    assert expected in message
    assert "\n" not in message


def test_the_fingerprint_knows_content_and_split():
    before = fingerprint(Source("org/data", split="train"))
    assert before == fingerprint(Source("org/data", split="train"))
    assert before != fingerprint(Source("org/data", split="test"))
    pq.write_table(pa.Table.from_pylist(ROWS[:100]), "org/data/train-0.parquet")
    assert before != fingerprint(Source("org/data", split="train"))
