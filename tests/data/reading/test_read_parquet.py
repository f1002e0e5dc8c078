import datetime
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lightning.data.rows.readers import BATCH_ROWS, Cursor, read_parquet
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_line_is_the_number_of_the_row():
    messages = [{"role": "user", "content": "é"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "n": 1}, {"messages": None, "n": 2}]), "a.parquet")
    assert list(read_parquet(Path("a.parquet"), Cursor())) == [
        (1, {"messages": messages, "n": 1}, ""),
        (2, {"messages": None, "n": 2}, ""),
    ]


def test_reading_begins_in_the_row_group_of_the_cursor():
    pq.write_table(pa.table({"x": list(range(2000))}), "a.parquet", row_group_size=700)
    for count in (0, 1, 699, 700, 701, 1399, 1400, 1999, 2000):
        rows = list(read_parquet(Path("a.parquet"), Cursor(count=count)))
        assert [values["x"] for _, values, _ in rows] == list(range(count, 2000))
        assert [line for line, _, _ in rows] == list(range(count + 1, 2001))


def test_values_that_json_does_not_know_come_as_python_has_them():
    pq.write_table(pa.table({"day": [datetime.date(2024, 1, 2)], "raw": [b"\xff"]}), "a.parquet")
    ((_, values, _),) = read_parquet(Path("a.parquet"), Cursor())
    assert values == {"day": datetime.date(2024, 1, 2), "raw": b"\xff"}


@pytest.mark.parametrize("damage", [b"", b"PAR1", b'{"x": 1}\n' * 9])
def test_a_file_that_is_no_parquet_is_refused(damage):
    Path("a.parquet").write_bytes(damage)
    with pytest.raises(UserError, match=r"a.parquet cannot be read as parquet: Parquet .*Write or download it again"):
        list(read_parquet(Path("a.parquet"), Cursor()))


def test_a_damaged_page_is_refused_where_it_is_reached():
    table = pa.table({"x": [f"a row of text {number}" for number in range(2000)]})
    pq.write_table(table, "a.parquet", row_group_size=1000, use_dictionary=False)
    begin = pq.ParquetFile("a.parquet").metadata.row_group(1).column(0).data_page_offset
    content = bytearray(Path("a.parquet").read_bytes())
    content[begin + 100 : begin + 600] = bytes(500)
    Path("a.parquet").write_bytes(content)
    rows = read_parquet(Path("a.parquet"), Cursor())
    assert [next(rows)[0] for _ in range(3 * BATCH_ROWS)] == list(range(1, 769))
    with pytest.raises(UserError, match=r"a.parquet cannot be read as parquet from row 769 on: "):
        next(rows)


def test_memory_does_not_grow_with_the_file():
    rows = {"x": [f"{number} " * 400 for number in range(20_000)]}
    pq.write_table(pa.table(rows), "a.parquet", compression="none", use_dictionary=False)  # one row group of 47 MB
    assert pq.ParquetFile("a.parquet").num_row_groups == 1
    del rows
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    tracemalloc.start()
    for line, _, _ in read_parquet(Path("a.parquet"), Cursor()):
        peak = max(peak, pool.bytes_allocated() - before) if line % 100 == 0 else peak
    assert line == 20_000
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + python_peak < Path("a.parquet").stat().st_size / 4


def test_keys_that_arrow_fills_in_are_left_out(tmp_path):
    """Every struct of a column has the keys of all; a null inside would teach the model to write it."""
    rows = [{"call": {"city": "Rome"}, "n": None}, {"call": {"day": "Monday", "list": [{"a": 1}, {"b": 2}]}, "n": 1}]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert [values for _, values, _ in read_parquet(file, Cursor())] == rows
