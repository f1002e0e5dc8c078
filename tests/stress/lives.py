"""Runs training in child processes, kills them at random moments, and resumes from what is on disk."""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import lightning
import yaml
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.equality import differences, read_checkpoint


class Killer(lightning.Callback):
    """Kill this process ``KILL_AFTER`` seconds after training has begun; without that variable, never.

    If ``BEGAN_AT`` names a file, the moment at which training began is written there.
    """

    def on_train_start(self, trainer, pl_module):
        if file := os.environ.get("BEGAN_AT"):
            Path(file).write_text(str(time.time()))
        if seconds := os.environ.get("KILL_AFTER"):
            timer = threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


def torture(processes: int, base: str, folder: Path, kills: int, seed: int) -> tuple[int, list[str]]:
    """Train once in peace, then again and again, killed at random moments, so many times in all; compare the ends.

    Returns:
        How many lives that took, and what differed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder)
    began = folder / "began"
    assert _live(processes, base, folder, "peace", began=began) == 0
    seconds = time.time() - float(began.read_text())
    steps = _steps(folder / "peace")
    chance = random.Random(seed)
    killed, lives, differing, chain = 0, 0, [], 0
    while killed < kills:
        chain += 1
        run, dead = f"killed-{chain}", True
        while dead:
            left = (1 - _steps(folder / run) / steps) * seconds
            wait = chance.uniform(0, 2 * left / (kills - killed + 1)) if killed < kills else None
            dead = _live(processes, base, folder, run, wait) != 0
            lives += 1
            killed += dead
        differing += [f"{run}: {found}" for found in differences(folder / "peace", folder / run)]
    return lives, differing


def _live(processes: int, base: str, folder: Path, run: str, wait: float | None = None, began: Path | None = None):
    """Train in forked children until they end or are killed; gives the exit code of rank 0, which kills itself."""
    (folder / f"{run}.yaml").write_text(yaml.safe_dump(_config(processes, base, run)))  # once: every rank reads it
    port = find_free_network_port()
    children = [_fork(processes, folder, run, rank, port, wait, began) for rank in range(processes)]
    first, others = children[0], children[1:]
    code = _wait_for(first)  # before the others: it alone kills itself, and they may notice and end with an error
    if code != 0:
        for other in others:  # they would only wait for the dead one
            os.kill(other, signal.SIGKILL)
    codes = [code, *map(_wait_for, others)]
    if code != -signal.SIGKILL and any(codes):
        logs = [(folder / f"{run}-{rank}.log").read_text()[-3000:] for rank in range(processes)]
        raise RuntimeError(f"{run} ended with exit codes {codes}:\n" + "\n".join(logs))
    return code


def _wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _fork(processes, folder, run, rank, port, wait, began):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / f"{run}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        if processes > 1:  # as torchrun would set them
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "stress",
            }  # fmt: skip
        if wait is not None and rank == 0:
            os.environ["KILL_AFTER"] = str(wait)
        if began is not None:
            os.environ["BEGAN_AT"] = str(began)
        from qlora_lightning.cli import main

        code = main(["fit", "--config", f"{run}.yaml", "--ckpt_path", "last"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _config(processes: int, base: str, run: str) -> dict:
    data = {"train": "train.jsonl", "val": "val.jsonl", "batch_size": 2 // processes}
    trainer = {
        "accelerator": "cpu",
        "devices": processes,
        "accumulate_grad_batches": 4,
        "val_check_interval": 8,  # inside the epoch too
        "max_epochs": 2,
        "enable_progress_bar": False,
        "default_root_dir": run,
        "callbacks": [{"class_path": "tests.stress.lives.Killer"}],
    }
    if processes > 1:
        trainer["strategy"] = "ddp"
    return {
        "seed_everything": 3,
        "model": {"base": base, "rank": 4, "dropout": 0.1, "learning_rate": 1.0e-3},
        "data": data,
        "adapter_checkpoint": {"every_n_train_steps": 1},
        "trainer": trainer,
    }


def _write_rows(folder: Path) -> None:
    """Write ragged rows: 32 to train on, so that an epoch has 16 batches and 4 windows, and 6 to validate on."""
    rows = [
        {"prompt": f"Count to {n}." + " Please." * (n % 5), "completion": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, 39)
    ]
    for name, part in (("train", rows[:32]), ("val", rows[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def _steps(run: Path) -> int:
    return read_checkpoint(run)["global_step"] if (run / "checkpoints" / "last.ckpt").exists() else 0
