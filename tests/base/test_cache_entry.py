import os
from pathlib import Path

from qlora_lightning.base.cache import describe_remains, mark_used, read_entry, seal_entry


def test_a_sealed_folder_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(b"abcd")
    seal_entry(tmp_path, "thing", {"a": 1})
    entry = read_entry(tmp_path, "quantized")
    assert entry is not None
    assert (entry.kind, entry.label, entry.size_bytes, entry.complete) == ("quantized", "thing", 4, True)
    assert entry.path == tmp_path


def test_a_folder_that_was_never_sealed_is_no_entry(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abcd")
    assert read_entry(tmp_path, "unpacked") is None
    remains = describe_remains(tmp_path, "unpacked")
    assert (remains.size_bytes, remains.complete) == (4, False)


def test_use_moves_the_time_of_use_and_not_the_time_of_making(tmp_path: Path) -> None:
    seal_entry(tmp_path, "thing", {})
    os.utime(tmp_path / "entry.json", (1_000_000, 1_000_000))
    before = read_entry(tmp_path, "unpacked")
    mark_used(tmp_path)
    after = read_entry(tmp_path, "unpacked")
    assert before is not None
    assert after is not None
    assert before.created == after.created
    assert before.last_used.timestamp() == 1_000_000 < after.last_used.timestamp()
