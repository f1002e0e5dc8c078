"""The batch file that a recipe ships runs under SLURM, and a job that is stopped and queued again ends the same.

SLURM is played by two scripts, of what it does for a job: ``srun`` starts the processes, ``scontrol`` queues it again.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.report import read_metrics
from tests.distributed.runs import CONFIG, environment
from tests.equality import adapter_bytes

pytestmark = pytest.mark.slow

RECIPE = "llama-3.1-8b-multi-gpu"
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & done
code=0
for process in $(jobs -p); do wait "$process" || code=$?; done
exit $code
"""
SCONTROL = '#!/bin/bash\necho "$@" >> asked\n'
JOB = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0"}
JOB |= {"NODELIST": "127.0.0.1", "CPUS_PER_TASK": "1"}


def test_a_job_that_is_signalled_and_queued_again_ends_as_one_that_was_not(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["recipes", "copy", RECIPE]) == 0
    Path("bin").mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        Path("bin", name).write_text(script)
        Path("bin", name).chmod(0o755)
    ask = {"at": 4, "number": int(signal.SIGUSR1)}  # which SLURM sends to all processes of a job
    callbacks = [{"class_path": "hooks.Ask", "init_args": {**ask, "rank": rank}} for rank in (0, 1)]
    config = {**CONFIG, "model": {**CONFIG["model"], "dropout": 0.1}, "data": {"train": "rows.jsonl", "batch_size": 1}}
    config["trainer"] = {**CONFIG["trainer"], "callbacks": callbacks, "accumulate_grad_batches": 3, "max_epochs": 2}
    Path("configs", f"{RECIPE}.yaml").write_text(yaml.safe_dump(config))
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**environment(folder), "PATH": path, **{f"SLURM_{name}": value for name, value in JOB.items()}}

    def run(name, *options, restarts=0):
        script = ["bash", f"configs/{RECIPE}/slurm.sbatch", "--trainer.default_root_dir", f"slurm/{name}", *options]
        job = {**env, "SLURM_RESTART_COUNT": str(restarts)}
        return subprocess.run(script, env=job, capture_output=True, text=True, timeout=900)

    no_signal = ["--trainer.callbacks", "null"]
    assert (whole := run("whole", *no_signal)).returncode == 0, whole.stderr
    assert (stopped := run("stopped")).returncode == 128 + signal.SIGUSR1, stopped.stderr
    assert Path("asked").read_text() == "requeue 7\n"
    assert (resumed := run("stopped", *no_signal, restarts=1)).returncode == 0, resumed.stderr
    assert adapter_bytes(Path("slurm", "stopped")) == adapter_bytes(Path("slurm", "whole"))
    logged = [read_metrics(Path("slurm", name, "metrics.csv")) for name in ("stopped", "whole")]
    for column in ("train_loss", "tokens_seen"):
        assert logged[0][column] == logged[1][column]
