"""A process that dies takes the others with it, which report who died, and why."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from qlora_lightning.callbacks import process_watch
from tests.distributed.runs import CONFIG, environment

pytestmark = pytest.mark.slow


def wait_for_end(pid, seconds):
    """Wait until there is no such process."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} is still there after {seconds} s")


KILLED, RAISED = "without a word: killed", ": ValueError: no rows left"


# asleep: as in an exchange over NCCL, which does not notice
@pytest.mark.parametrize(
    ("strategy", "processes", "rank", "error", "others_sleep", "code", "reports"),
    [
        ("ddp", 2, 1, None, 0.0, 1, 1),
        ("ddp", 2, 0, None, 100.0, -signal.SIGKILL, 1),
        ("ddp", 2, 1, "no rows left", 100.0, 1, 1),
        ("ddp", 2, 0, "no rows left", 0.0, 1, 1),
        ("ddp", 3, 2, None, 100.0, 1, 2),
        ("ddp_sharded", 2, 1, None, 0.0, 1, 1),
    ],
)
def test_a_process_that_dies_ends_the_others_which_say_who_and_why(
    folder, strategy, processes, rank, error, others_sleep, code, reports
):
    name = f"die-{strategy}-{processes}-{rank}-{others_sleep}"
    die = {"class_path": "hooks.Die", "init_args": {"rank": rank, "error": error, "others_sleep": others_sleep}}
    config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 1}}
    config["trainer"] = {**CONFIG["trainer"], "devices": processes, "callbacks": [die], "default_root_dir": name}
    config["trainer"]["strategy"] = strategy
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "qlora_lightning", "fit", "--config", f"{name}.yaml"]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environment(folder), stdout=log, stderr=log, timeout=120)
    for other in range(processes):
        wait_for_end(int((folder / f"pid-{other}").read_text()), seconds=30)
    said = (folder / f"{name}.log").read_text()
    assert done.returncode == code, said
    sentence = f"process {rank} of {processes} (counted from 0) on {socket.gethostname()} ended"
    assert said.count(f"{sentence}{RAISED if error else f' {KILLED}'}") == reports, said
    assert ("Traceback" in said) is (error is not None)


def test_a_stranger_that_says_nothing_does_not_hold_up_the_processes(monkeypatch):
    monkeypatch.setattr(process_watch, "_GRACE", 0.1)
    first, other = process_watch._Watch([]), process_watch._Watch([])
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        other.connect(*server.getsockname(), "password other", "first")
        first.accept(server, "password", 1)
    assert first.wait() == other.wait() == ""
    for watch in (first, other):
        watch.leave("done")
