"""A signal that one of two processes gets stops both at the same batch; one that dies takes the other with it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.distributed.runs import CONFIG, adapter_bytes, environment, launch, metrics

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


def run(folder, strategy, **die):
    """Start two processes by Lightning's own launcher; gives the first one's exit code, and what both said."""
    config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 1}}
    callbacks = [{"class_path": "hooks.Die", "init_args": die}]
    config["trainer"] = {**CONFIG["trainer"], "strategy": strategy, "callbacks": callbacks}
    name = f"die-{strategy}-{'-'.join(map(str, die.values()))}"
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


@pytest.mark.parametrize("strategy", ["ddp", "ddp_sharded"])
def test_the_others_end_when_the_first_process_is_killed(folder, strategy):
    code, _ = run(folder, strategy, rank=0, others_sleep=100.0)  # asleep, as in an exchange that nobody answers
    assert code == -signal.SIGKILL
    wait_for_end(int((folder / "pid-1").read_text()), seconds=20)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_sharded"])
def test_the_first_process_ends_when_another_is_killed(folder, strategy):
    code, log = run(folder, strategy, rank=1)
    said = log.read_text()
    assert code == 1
    assert "process 0 of 2 (counted from 0) can no longer reach another one" in said
    assert "Traceback" not in said
