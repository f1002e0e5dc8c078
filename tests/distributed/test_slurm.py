"""The batch file that a recipe ships runs under SLURM, and a job that is stopped and queued again ends the same."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from tests.distributed.runs import CONFIG, environment, metrics
from tests.equality import adapter_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="takes Debian's slurm-wlm"),
]

RECIPE = "llama-3.1-8b-multi-gpu"
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a user of a cluster: this machine, with two processors."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    with contextlib.ExitStack() as bound:
        servers = [bound.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [server.getsockname()[1] for server in servers]
    settings = SETTINGS.format(host=socket.gethostname().partition(".")[0], ports=ports, folder=folder)
    (folder / "slurm.conf").write_text(settings)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    with contextlib.ExitStack() as daemons:
        for command in (["slurmctld", "-D"], ["slurmd", "-D"]):
            log = daemons.enter_context((folder / f"{command[0]}.log").open("w"))
            daemon = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            daemons.callback(daemon.wait, timeout=60)
            daemons.callback(daemon.terminate)
        for _ in range(60):
            if subprocess.run(["sinfo", "-h", "-o%T"], env=env, capture_output=True, text=True).stdout == "idle\n":
                break
            time.sleep(1)
        else:
            pytest.fail("\n".join(file.read_text() for file in folder.glob("*.log")))
        yield env


def finish(job, env):
    """Wait until a job has ended, without the two minutes for which SLURM holds back a job that is queued again."""
    for _ in range(600):
        shown = subprocess.run(["scontrol", "show", "job", job, "-o"], env=env, capture_output=True, text=True).stdout
        facts = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        if facts["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "PREEMPTED", "REQUEUED"):
            break
        if facts["Reason"] == "BeginTime":
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=env, check=True)
        time.sleep(1)
    return facts["JobState"], int(facts["Restarts"])


def test_a_job_that_is_signalled_and_preempted_ends_as_one_that_was_not(cluster, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["recipes", "copy", RECIPE]) == 0
    commands = {  # what SLURM does when the time is nearly up; and what a more urgent job does
        3: ["scancel", "--signal=USR1", "$SLURM_JOB_ID"],
        9: ["sbatch", "--partition=urgent", "--ntasks=2", "--output=urgent.log", "--wrap=true"],
    }
    callbacks = [{"class_path": "hooks.Call", "init_args": {"commands": commands}}]
    config = {**CONFIG, "model": {**CONFIG["model"], "dropout": 0.1}, "data": {"train": "rows.jsonl", "batch_size": 1}}
    config["trainer"] = {**CONFIG["trainer"], "callbacks": callbacks, "accumulate_grad_batches": 3, "max_epochs": 2}
    Path("configs", f"{RECIPE}.yaml").write_text(yaml.safe_dump(config))
    env = {**environment(folder), **{name: cluster[name] for name in ("PATH", "SLURM_CONF")}}
    sbatch = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
    jobs = {}
    for name, more in (("whole", ["--trainer.callbacks", "null"]), ("stopped", [])):
        script = [f"--job-name={name}", f"configs/{RECIPE}/slurm.sbatch", "--trainer.default_root_dir", f"slurm/{name}"]
        done = subprocess.run([*sbatch, *script, *more], env=env, check=True, capture_output=True, text=True)
        jobs[name] = done.stdout.strip()
    for name, restarts in (("whole", 0), ("stopped", 2)):
        assert finish(jobs[name], env) == ("COMPLETED", restarts), Path(f"{name}-{jobs[name]}.log").read_text()
    said = Path(f"stopped-{jobs['stopped']}.log").read_text()
    assert said.count("saved in slurm/stopped/checkpoints/last.ckpt") == 2
    whole, stopped = Path("slurm", "whole"), Path("slurm", "stopped")
    assert adapter_bytes(stopped) == adapter_bytes(whole)
    for column in ("step", "train_loss", "tokens_seen"):
        assert metrics(stopped, column) == metrics(whole, column)
