"""A process that dies takes the others with it, within seconds and with a message."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.distributed.runs import CONFIG, environment


def run(folder, **die):
    """Start two processes by Lightning's own launcher; gives the first one's exit code, and what both said."""
    config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 1}}
    config["trainer"] = {**CONFIG["trainer"], "callbacks": [{"class_path": "hooks.Die", "init_args": die}]}
    name = f"die-{'-'.join(map(str, die.values()))}"
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "qlora_lightning", "fit", "--config", f"{name}.yaml"]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [*command, "--trainer.default_root_dir", name],
            cwd=folder,
            env=environment(folder),
            stdout=log,
            stderr=log,
            timeout=120,
            check=False,
        )
    return done.returncode, folder / f"{name}.log"


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
    pytest.fail(f"the other process is still there after {seconds} s")


@pytest.mark.slow
def test_the_others_end_when_the_first_process_is_killed(folder):
    code, log = run(folder, rank=0, others_sleep=100.0)  # asleep, as in an exchange that nobody answers
    assert code == -signal.SIGKILL
    wait_for_end(int((folder / "pid-1").read_text()), seconds=20)
    assert "the first process is gone, so process 1 ends too" in log.read_text()


@pytest.mark.slow
def test_the_first_process_ends_when_another_is_killed(folder):
    code, log = run(folder, rank=1)
    said = log.read_text()
    assert code == 1
    assert "process 0 of 2 (counted from 0) can no longer reach another one" in said
    assert "Traceback" not in said
