"""A signal that one of two processes gets stops both at the same step; one that dies takes the other with it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from tests.distributed.runs import CONFIG, environment, launch, metrics
from tests.equality import adapter_bytes

pytestmark = pytest.mark.slow

STOPS = {
    "training": {"rank": 1, "batch": 4},  # the first batch of the second window
    "validation": {"rank": 1, "batch": 1, "validation": True, "number": int(signal.SIGHUP)},
}


@pytest.fixture(scope="module")
def output(folder) -> str:
    options = ["--model.dropout", "0.1", "--data.batch_size", "1", "--data.val", "nine.jsonl"]
    options += ["--trainer.accumulate_grad_batches", "3"]
    commands, resumes = [], []
    for name, stop in {"whole": None, **STOPS}.items():
        callbacks = [{"class_path": "hooks.Ask", "init_args": stop}] if stop else None
        trainer = {**CONFIG["trainer"], "default_root_dir": f"stop/{name}", "callbacks": callbacks}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": trainer}))
        commands.append(["fit", "--config", f"{name}.yaml", *options])
        if stop:
            place = ["--trainer.default_root_dir", f"stop/{name}", "--ckpt_path", "last"]
            resumes.append(["fit", "--config", "whole.yaml", *options, *place])
    return launch(folder, commands + resumes)


def test_both_end_with_the_code_of_the_signal_and_say_how_to_resume(output):
    # of the SIGHUP that the second process got, the first knows only that one came
    assert (output.count("code 143"), output.count("code 129"), output.count("code 0")) == (3, 1, 6)
    assert output.count("saved in stop/training/checkpoints/last.ckpt. To resume, add `--ckpt_path last`") == 1


@pytest.mark.usefixtures("output")
@pytest.mark.parametrize("name", STOPS)
def test_the_resumed_run_ends_as_the_one_that_never_stopped(folder, name):
    stopped, whole = folder / "stop" / name, folder / "stop" / "whole"
    assert adapter_bytes(stopped) == adapter_bytes(whole)
    for column in ("step", "train_loss", "val_loss", "tokens_seen"):
        assert metrics(stopped, column) == metrics(whole, column)


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
    output = (folder / f"{name}.log").read_text()
    assert done.returncode == code, output
    sentence = f"process {rank} of {processes} (counted from 0) on {socket.gethostname()} ended"
    assert output.count(f"{sentence}{RAISED if error else f' {KILLED}'}") == reports, output
    assert ("Traceback" in output) is (error is not None)
