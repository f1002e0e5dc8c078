import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from qlora_lightning.data.rows.readers import open_stream
from qlora_lightning.data.rows.sources import describe_kinds, kind_of
from qlora_lightning.support.errors import UserError

LINES = b"".join(b'{"x": %d}\n' % number for number in range(50_000))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, data):
    """Write compressed bytes, whole."""
    if name.endswith(".zst"):
        with pa.CompressedOutputStream(name, "zstd") as stream:
            stream.write(data)
    else:
        Path(name).write_bytes(lzma.compress(data) if name.endswith(".xz") else gzip.compress(data))


def read(name, offset=0):
    with open_stream(Path(name), offset) as stream:
        return stream.read()


def test_kinds_are_told_by_the_name():
    assert kind_of(Path("a.b/Train.JSONL.GZ")) == (".jsonl", ".gz")
    assert kind_of(Path("a.parquet")) == (".parquet", "")
    assert kind_of(Path("a.txt.bz2")) == ("", ".bz2")
    assert kind_of(Path("README.md")) == ("", "")
    assert describe_kinds() == ".jsonl, .json, .csv or .parquet, each also compressed (.gz, .bz2, .xz, .zst)"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_streams_laid_end_to_end_are_one_and_can_be_entered_anywhere(name):
    write(name, LINES)
    Path(name).write_bytes(Path(name).read_bytes() * 2)
    assert read(name) == LINES * 2
    assert read(name, len(LINES) + 9) == LINES[9:]
    assert read(name, 2 * len(LINES)) == b""
    with pytest.raises(UserError, match=f"{name} ends before byte {2 * len(LINES) + 1}"):
        read(name, 2 * len(LINES) + 1)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_cut_off_or_damaged_is_named(name):
    write(name, LINES)
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name} is (cut off|damaged).*compress or download it again"):
        read(name)
    Path(name).write_bytes(LINES[:1000])
    with pytest.raises(UserError, match=rf"{name} is damaged, or not a {Path(name).suffix} file"):
        read(name)
    if name.endswith(".zst"):
        return  # pyarrow writes no checksums
    Path(name).write_bytes(whole[:200] + bytes(20) + whole[220:])
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        read(name)


def test_an_error_of_the_system_is_told_in_its_words():
    Path("a.jsonl").mkdir()
    with pytest.raises(UserError, match=r"a.jsonl cannot be read: .*Is a directory"):
        read("a.jsonl")
    with pytest.raises(UserError, match=r"b.jsonl.zst cannot be read: .*No such file"):
        read("b.jsonl.zst")
