"""A process that dies takes the others with it, which report who died, and why."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

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


# asleep: as in an exchange over NCCL, which does not notice
@pytest.mark.parametrize(
    ("strategy", "processes", "rank", "error", "others_sleep", "code"),
    [
        ("ddp", 2, 0, None, 100.0, -signal.SIGKILL),
        ("ddp", 3, 1, "no rows left", 100.0, 1),
        ("ddp_sharded", 2, 1, None, 0.0, 1),
    ],
)
def test_a_process_that_dies_ends_the_others_which_say_who_and_why(
    folder, strategy, processes, rank, error, others_sleep, code
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
    assert (
        said.count(f"{sentence}{': ValueError: no rows left' if error else ' without a word: killed'}") == processes - 1
    ), said
    assert ("Traceback" in said) is (error is not None)
