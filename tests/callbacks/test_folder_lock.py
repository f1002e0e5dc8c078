import errno
import multiprocessing
import subprocess
import sys
import types

import pytest

from qlora_lightning.callbacks.folder_lock import FolderLock
from qlora_lightning.support.errors import UserError

HOLDER = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def locks():
    one, other = FolderLock(), FolderLock()
    yield one, other
    one.release()
    other.release()


def test_two_do_not_train_in_one_folder_and_the_next_may_and_no_file_is_left(locks, tmp_path):
    one, other = locks
    one.take(tmp_path / "run")
    other.take(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"^A run is going on in .*/run: wait until it has ended, or name another folder"
    ):
        other.take(tmp_path / "run")
    one.release()
    other.take(tmp_path / "run")
    assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "checkpoints"]


def test_one_that_takes_again_does_not_stand_in_its_own_way(locks, tmp_path):
    locks[0].take(tmp_path)
    locks[0].take(tmp_path)
    locks[0].release()
    locks[0].release()
    locks[1].take(tmp_path)


def test_a_killed_process_lets_go(locks, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    command = [sys.executable, "-c", HOLDER, tmp_path / "checkpoints"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="A run is going on"):
            locks[0].take(tmp_path)
        holder.kill()
    locks[0].take(tmp_path)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_worker_that_outlives_its_run_holds_nothing(locks, tmp_path):
    locks[0].take(tmp_path)
    context = multiprocessing.get_context("fork")
    began, end = context.Event(), context.Event()
    worker = context.Process(target=lambda: (began.set(), end.wait(60)), daemon=True)
    worker.start()
    assert began.wait(60)
    with pytest.raises(UserError, match="A run is going on"):
        locks[1].take(tmp_path)
    locks[0].release()
    locks[1].take(tmp_path)
    end.set()
    worker.join()


def fail(*_):
    raise OSError(errno.EBADF, "Bad file descriptor")


@pytest.mark.parametrize("module", [types.SimpleNamespace(flock=fail, LOCK_EX=2, LOCK_NB=4), None])
def test_where_there_are_no_such_locks_it_goes_on_without(locks, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, "fcntl", module)
    for lock in locks:
        lock.take(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused(locks, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"default_root_dir .*file cannot be written to: Not a directory\."):
        locks[0].take(tmp_path / "file")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot be written to: Permission denied\. Name another folder\."):
        locks[0].take(tmp_path)
