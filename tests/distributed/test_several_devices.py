"""The commands that configs/README.md shows for several devices, run by two processes of this machine's CPU.

Each ends in the same bytes: by Lightning's launcher, by two of torchrun, by Ray after a worker was killed, sharded.
"""

import importlib.util
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from qlora_lightning.cli import main
from tests.distributed.runs import CONFIG, environment, launch
from tests.equality import adapter_bytes

pytestmark = pytest.mark.slow

RECIPE = "llama-3.1-8b-multi-gpu"
PAGE = (Path(__file__).parents[2] / "configs" / "README.md").read_text(encoding="utf-8")
SHOWN = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)).replace("\\\n", "")
PROGRAMS = {
    "qlora-lightning": ["-m", "qlora_lightning"],
    "torchrun": ["-m", "torch.distributed.run"],
    "python": [],
}


def shown(*words):
    """The page's one command that has these words, as arguments of this interpreter."""
    (line,) = (line for line in SHOWN.splitlines() if all(word in line for word in words))
    program, *arguments = shlex.split(line)
    return [sys.executable, *PROGRAMS[program], *arguments]


def run(folder, *commands, **more):
    """Run commands beside each other; give what they printed."""
    env = {**environment(folder), **more}
    started = [
        subprocess.Popen(each, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for each in commands
    ]
    said = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    return "\n".join(said)


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    """The adapter of two processes of one torchrun; the recipe is in the folder, its config is of the tiny base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shown("recipes copy")[3:]) == 0
    config = {**CONFIG, "data": {"train": "rows.jsonl", "batch_size": 2}, "evaluation": None}
    (folder / "configs" / f"{RECIPE}.yaml").write_text(yaml.safe_dump(config))
    launch(folder, [["fit", "--config", f"configs/{RECIPE}.yaml", "--trainer.default_root_dir", "whole"]])
    return adapter_bytes(folder / "whole")


@pytest.mark.parametrize("words", [["fit", "ckpt_path last"], ["fit", "ddp_sharded"]], ids=["ddp", "ddp_sharded"])
def test_one_machine(folder, whole, words):
    words = ["qlora-lightning", *words]
    run(folder, [*shown(*words), "--trainer.default_root_dir", f"one/{words[-1]}"])
    assert adapter_bytes(folder / "one" / words[-1]) == whole


def test_two_machines(folder, whole):
    with socket.create_server(("127.0.0.1", 0)) as free:
        host = f"127.0.0.1:{free.getsockname()[1]}"
    command = [{"HOST:29500": host, "8": "1"}.get(word, word) for word in shown("torchrun", "--nnodes 2")]
    command += ["--trainer.devices", "1", "--trainer.default_root_dir", "two"]
    run(folder, command, command)
    assert adapter_bytes(folder / "two") == whole


@pytest.mark.alone
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='takes Ray: pip install -e ".[ray]"')
def test_ray_starts_again_from_the_last_checkpoint_when_a_worker_is_killed_and_reports_no_usage(
    folder, whole, monkeypatch
):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    command = [{"16": "2"}.get(word, word) for word in shown("ray_train.py") if word != "--gpus"]
    command += ["--trainer.callbacks+=hooks.DieOnce", "--adapter_checkpoint.every_n_train_steps", "1"]
    with tempfile.TemporaryDirectory(prefix="ray-") as logs:  # sockets are there too: a short path
        run(folder, [*command, "--trainer.default_root_dir", "ray"], RAY_TMPDIR=logs)
        assert "Usage reporting is disabled" in "".join(file.read_text() for file in Path(logs).rglob("dashboard.log"))
    assert (folder / "died").exists()
    assert adapter_bytes(folder / "ray") == whole
