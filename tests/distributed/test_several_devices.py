"""The commands that configs/README.md shows for several devices, run by two processes of this machine's CPU.

Each ends in the same bytes: by Lightning's launcher, sharded, by two of torchrun of which one is lost and comes back,
by Ray after a worker was killed.
"""

import contextlib
import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from qlora_lightning.cli import main
from tests.distributed.runs import CONFIG, environment, launch
from tests.equality import adapter_bytes

pytestmark = pytest.mark.slow

RECIPE = "llama-3.1-8b-multi-gpu"
PAGE = (Path(__file__).parents[2] / "configs" / "README.md").read_text(encoding="utf-8")
SHOWN = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)).replace("\\\n", "")
PROGRAMS = {"qlora-lightning": ["-m", "qlora_lightning"], "torchrun": ["-m", "torch.distributed.run"], "python": []}


def shown(*words):
    """The page's one command that has these words, as arguments of this interpreter."""
    (line,) = (line for line in SHOWN.splitlines() if all(word in line for word in words))
    program, *arguments = shlex.split(line)
    return [sys.executable, *PROGRAMS[program], *arguments]


def start(folder, command, log, **variables):
    with (folder / log).open("a") as output:
        env = {**environment(folder), **variables}
        return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    """The adapter of two processes of one torchrun; the recipe is in the folder, its config is of the tiny base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shown("recipes copy")[3:]) == 0
    config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 2}, "evaluation": None}
    config["trainer"] = {**CONFIG["trainer"], "callbacks": [{"class_path": "hooks.LoseMachine"}]}
    config["adapter_checkpoint"] = {"every_n_train_steps": 1}
    (folder / "configs" / f"{RECIPE}.yaml").write_text(yaml.safe_dump(config))
    launch(folder, [["fit", "--config", f"configs/{RECIPE}.yaml", "--trainer.default_root_dir", "whole"]])
    return adapter_bytes(folder / "whole")


@pytest.mark.parametrize(
    "words", [[f"{RECIPE}.yaml", "ckpt_path last"], ["fit", "ddp_sharded"]], ids=["ddp", "ddp_sharded"]
)
def test_one_machine(folder, whole, words):
    command = [*shown("qlora-lightning", *words), "--trainer.default_root_dir", f"one/{words[-1]}"]
    assert start(folder, command, "one.log").wait(900) == 0, (folder / "one.log").read_text()
    assert adapter_bytes(folder / "one" / words[-1]) == whole


def test_two_machines_of_which_one_is_lost_and_comes_back(folder, whole):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [{"HOST:29500": f"127.0.0.1:{port}", "8": "1"}.get(word, word) for word in shown("torchrun", "--nnodes")]
    command += ["--trainer.devices", "1", "--trainer.default_root_dir", "two"]
    shares = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the page says
    first = start(folder, command, "first.log", **shares)
    try:
        for _ in range(600):  # until it serves the rendezvous
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        assert start(folder, command, "second.log", LOST_AT_BATCH="2", **shares).wait(200) == -9
        assert start(folder, command, "second.log", **shares).wait(200) == 0, (folder / "second.log").read_text()
        assert first.wait(60) == 0
    finally:
        first.kill()
    assert adapter_bytes(folder / "two") == whole


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='takes Ray: pip install -e ".[ray]"')
def test_ray_starts_again_when_a_worker_is_killed_and_reports_no_usage(folder, whole, monkeypatch):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    command = [{"16": "2"}.get(word, word) for word in shown("ray_train.py") if word != "--gpus"]
    command += ["--trainer.callbacks+=hooks.DieOnce", "--trainer.default_root_dir", "ray"]
    with tempfile.TemporaryDirectory(prefix="ray-") as logs:  # sockets are there too: a short path
        assert start(folder, command, "ray.log", RAY_TMPDIR=logs).wait(900) == 0, (folder / "ray.log").read_text()
        assert "Usage reporting is disabled" in "".join(file.read_text() for file in Path(logs).rglob("dashboard.log"))
    assert (folder / "died").exists()
    assert adapter_bytes(folder / "ray") == whole


# ---- a process that dies takes the others with it --------------------------------------------------------------------


def test_a_run_whose_first_process_is_killed_fails_and_the_next_start_resumes(folder):
    command = [sys.executable, "-m", "qlora_lightning", "fit", "--config", "die.yaml", "--ckpt_path", "last"]
    config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 2}, "evaluation": None}
    config["adapter_checkpoint"] = {"every_n_train_steps": 1}
    die = {"class_path": "hooks.Die", "init_args": {"rank": 0}}
    for callbacks, fails in (([die], True), ([], False)):
        trainer = {**CONFIG["trainer"], "callbacks": callbacks, "default_root_dir": "die"}
        (folder / "die.yaml").write_text(yaml.safe_dump({**config, "trainer": trainer}))
        assert (start(folder, command, "die.log").wait(200) != 0) is fails
        if fails:
            for other in range(2):
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(int((folder / f"pid-{other}").read_text())).wait(timeout=30)
    attempts = json.loads((folder / "die" / "manifest.json").read_text())["attempts"]
    assert attempts[-1]["from_step"] in (1, 2)
