import subprocess
import sys
from pathlib import Path

from qlora_lightning.base.cache import cached_folder, clear_entries, hash_key, list_entries


def _build(folder: Path) -> None:
    (folder / "weights").write_bytes(b"abc")


def test_entries_of_all_kinds_are_listed(cache: Path) -> None:
    assert list_entries() == []
    cached_folder("unpacked", {}, _build, "one")
    cached_folder("quantized", {}, _build, "two")
    assert {(entry.kind, entry.label, entry.size_bytes) for entry in list_entries()} == {
        ("unpacked", "one", 3),
        ("quantized", "two", 3),
    }
    assert [entry.label for entry in list_entries("quantized")] == ["two"]


def test_clearing_one_kind_leaves_the_other(cache: Path) -> None:
    cached_folder("unpacked", {}, _build, "one")
    kept = cached_folder("quantized", {}, _build, "two")
    report = clear_entries("unpacked")
    assert [entry.label for entry in report.removed] == ["one"]
    assert report.freed_bytes == 3
    assert list((cache / "unpacked").iterdir()) == []
    assert (kept / "weights").is_file()


def test_clearing_removes_remains_locks_and_fingerprints(cache: Path) -> None:
    folder = cached_folder("unpacked", {}, _build, "one")
    remains = folder.with_name(f".{hash_key({'killed': 1})}.123.abcd")
    remains.mkdir()
    (remains / "weights").write_bytes(b"12345")
    (cache / "fingerprints").mkdir()
    (cache / "fingerprints" / "x.json").write_text("{}")
    assert clear_entries().freed_bytes == 8
    assert [path for path in cache.rglob("*") if not path.is_dir()] == []
    assert list((cache / "unpacked").iterdir()) == []


def test_clearing_leaves_what_the_cache_did_not_make(cache: Path, tmp_path: Path) -> None:
    """QLORA_LIGHTNING_CACHE may be set to a folder that holds other things, and links may lead out of it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    folder = cached_folder("unpacked", {}, _build, "one")
    (folder / "link").symlink_to(outside)
    folder.with_name(hash_key({"linked": 1})).symlink_to(outside)
    (cache / "quantized").symlink_to(tmp_path)
    (cache / "thesis").write_text("thesis")
    (cache / "unpacked" / "notes").mkdir()
    clear_entries()
    assert not folder.exists()
    assert (outside / "precious").read_text() == "precious"
    assert (cache / "thesis").exists()
    assert (cache / "unpacked" / "notes").exists()


def test_an_entry_that_is_being_built_is_left_alone(cache: Path) -> None:
    folder = cached_folder("unpacked", {}, _build, "one")
    script = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, f"{folder}.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        report = clear_entries()
        process.communicate()
    assert [entry.label for entry in report.busy] == ["one"]
    assert report.removed == []
    assert (folder / "weights").is_file()
