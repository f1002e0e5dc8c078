"""A signal that one of two processes gets stops both at the same batch; one that dies takes the other with it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from qlora_lightning.callbacks import process_watch
from tests.distributed.runs import CONFIG, environment, launch, metrics
from tests.equality import adapter_bytes

pytestmark = pytest.mark.slow

STOPS = {
    "training": {"rank": 1, "batch": 4},  # the first batch of the second window
    "validation": {"rank": 1, "batch": 1, "validation": True, "number": int(signal.SIGHUP)},
}
STREAM = ["--data.streaming", "true", "--trainer.max_steps", "4"]


@pytest.fixture(scope="module")
def said(folder) -> str:
    options = ["--model.dropout", "0.1", "--data.batch_size", "1", "--data.val", "nine.jsonl"]
    options += ["--trainer.accumulate_grad_batches", "3"]
    runs = {"whole": (None, []), "stream": (None, STREAM)}
    runs |= {name: (stop, []) for name, stop in STOPS.items()} | {"stream-training": (STOPS["training"], STREAM)}
    commands, resumes = [], []
    for name, (stop, more) in runs.items():
        config = {**CONFIG, "trainer": {**CONFIG["trainer"], "default_root_dir": f"stop/{name}"}}
        if stop:
            callback = {"class_path": "hooks.Ask", "init_args": stop}
            config["trainer"] = {**config["trainer"], "callbacks": [callback]}
            more = [*more, "--adapter_checkpoint.every_minutes", "1e-6"]
            again = ["--trainer.default_root_dir", f"stop/{name}", "--ckpt_path", "last"]
            resumes.append(["fit", "--config", "whole.yaml", *options, *more, *again])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        commands.append(["fit", "--config", f"{name}.yaml", *options, *more])
    return launch(folder, commands + resumes)


def test_both_end_with_the_code_of_the_signal(said):
    # of the SIGHUP that the second process got, the first knows only that one came
    assert (said.count("code 143"), said.count("code 129"), said.count("code 0")) == (5, 1, 10)
    assert said.count("saved in stop/training/checkpoints/last.ckpt. To resume, add `--ckpt_path last`") == 1


@pytest.mark.parametrize(
    ("name", "whole"), [("training", "whole"), ("validation", "whole"), ("stream-training", "stream")]
)
def test_the_resumed_run_ends_as_the_one_that_never_stopped(said, folder, name, whole):
    assert adapter_bytes(folder / "stop" / name) == adapter_bytes(folder / "stop" / whole)
    for column in ("step", "train_loss", "val_loss", "tokens_seen"):
        assert metrics(folder / "stop" / name, column) == metrics(folder / "stop" / whole, column)


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
