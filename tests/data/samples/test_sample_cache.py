import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from qlora_lightning.data.cache import cached_samples, describe_sources
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.data.samples import SampleSetBuilder
from qlora_lightning.support.errors import UserError

REPOSITORY = Path(__file__).parents[3]
KEY = {"rows": "a"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samples"


class Prepare:
    """Makes one sample, and counts how often it was asked to."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        builder = SampleSetBuilder()
        builder.add([5, 6, 7], [-100, 6, 7], 0, 0, "a.jsonl", 1)
        return builder.build(), Report("train", rows=1, samples=1, duplicate_pairs=[("a.jsonl:2", "a.jsonl:1")])


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def test_what_was_prepared_once_is_mapped_the_next_time():
    prepare = Prepare()
    for _ in range(2):
        samples, report = cached_samples(KEY, "rows", prepare)
        assert is_mapped(samples.ids)
        assert samples[0].labels.tolist() == [-100, 6, 7]
        assert samples.where(0) == "a.jsonl:1"
        assert report == prepare()[1]
    assert prepare.calls == 1 + 2  # two of them by this test


@pytest.mark.parametrize("changed", [{"rows": "b"}, {"rows": "a", "system": None}])
def test_another_key_is_prepared_anew(changed):
    prepare = Prepare()
    cached_samples(KEY, "rows", prepare)
    cached_samples(changed, "rows", prepare)
    assert prepare.calls == 2


def test_another_version_of_a_library_is_prepared_anew(monkeypatch):
    prepare = Prepare()
    cached_samples(KEY, "rows", prepare)
    monkeypatch.setattr("tokenizers.__version__", "9")
    cached_samples(KEY, "rows", prepare)
    assert prepare.calls == 2


def test_what_preparing_refuses_is_refused_each_time_and_leaves_nothing(cache):
    def refuse():
        raise UserError("a.jsonl:1: empty")

    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.jsonl:1: empty"):
            cached_samples(KEY, "rows", refuse)
    assert not any(path.is_dir() for path in cache.iterdir())


def test_an_unwritable_cache_keeps_samples_in_memory_with_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "file"))
    prepare = Prepare()
    samples, report = cached_samples(KEY, "rows", prepare)
    assert (prepare.calls, len(samples), report.rows) == (1, 1, 1)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "The samples of rows are not kept for the next start" in record.message
    assert str(tmp_path / "file") in record.message


def test_a_full_disk_does_not_prepare_a_second_time(monkeypatch, caplog):
    def save(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_lightning.data.samples.SampleSet.save", save)
    prepare = Prepare()
    samples, _ = cached_samples(KEY, "rows", prepare)
    assert (prepare.calls, len(samples)) == (1, 1)
    assert "No space left on device" in caplog.text


def test_what_is_refused_without_a_cache_is_the_users_error_not_a_warning(tmp_path, monkeypatch, caplog):
    def refuse():
        raise UserError("a.jsonl:1: empty")

    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: empty"):
        cached_samples(KEY, "rows", refuse)


def test_a_killed_preparation_leaves_nothing_that_counts(cache):
    script = """
import os, signal
from tests.data.samples.test_sample_cache import KEY, Prepare
from qlora_lightning.data.cache import cached_samples
from qlora_lightning.data.samples import SampleSet

def save(self, folder):
    (folder / "ids.npy").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

SampleSet.save = save
cached_samples(KEY, "rows", Prepare())
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(cache.glob("*/ids.npy"))) == 1  # half of it is there
    prepare = Prepare()
    samples, _ = cached_samples(KEY, "rows", prepare)
    assert (prepare.calls, samples.ids.tolist()) == (1, [5, 6, 7])


def test_those_who_ask_at_once_prepare_once():
    prepare, all_here = Prepare(), threading.Barrier(3)
    found = []

    def ask():
        all_here.wait()
        found.append(cached_samples(KEY, "rows", prepare)[0].ids.tolist())

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[5, 6, 7]] * 3
    assert prepare.calls == 1


def test_sources_are_described_by_name_and_content(write):
    def describe():
        return describe_sources(find_sources(["a.jsonl", "b.jsonl"], "train"))

    for name in ("a.jsonl", "b.jsonl"):
        write(name, [{"prompt": "q"}])
    before = describe()
    assert [(found["path"], found["files"]) for found in before] == [(n, [n]) for n in ("a.jsonl", "b.jsonl")]
    assert before == describe()
    write("b.jsonl", [{"prompt": "r"}])  # as many bytes
    after = describe()
    assert before[0] == after[0]
    assert before[1] != after[1]
