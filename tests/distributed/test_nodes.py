"""Two machines by torchrun, which are two launchers here: one is lost and comes back."""

import socket
import subprocess
import sys
import time

import pytest
import yaml

from tests.distributed.runs import CONFIG, environment, launch, metrics
from tests.equality import adapter_bytes

pytestmark = pytest.mark.slow


def start_node(folder, log, port, **variables):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    fit = ["-m", "qlora_lightning", "fit", "--config", "nodes.yaml", "--ckpt_path", "last"]
    fit += ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.default_root_dir", "nodes/lost"]
    with (folder / log).open("a") as output:
        return subprocess.Popen(
            [*torchrun, *rendezvous, *fit],
            cwd=folder,
            # torch 2.13's launcher publishes the address of its store once, which one that comes later does not find
            env={**environment(folder), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **variables},
            stdout=output,
            stderr=output,
        )


def test_a_run_that_loses_a_machine_continues_when_it_is_back_and_ends_the_same(folder):
    config = {**CONFIG, "model": {**CONFIG["model"], "dropout": 0.1}, "data": {"train": "rows.jsonl", "batch_size": 1}}
    config["adapter_checkpoint"] = {"every_n_train_steps": 1}
    config["trainer"] = {**CONFIG["trainer"], "callbacks": [{"class_path": "hooks.LoseMachine"}]}
    (folder / "nodes.yaml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    first = start_node(folder, "first.log", port)
    try:
        for _ in range(600):  # until it serves the rendezvous
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        assert start_node(folder, "second.log", port, LOST_AT_BATCH="3").wait(200) == -9
        again = start_node(folder, "second.log", port)
        assert again.wait(200) == 0, (folder / "second.log").read_text()
        assert first.wait(60) == 0
    finally:
        first.kill()
    said = (folder / "first.log").read_text()
    assert f"of 2 (counted from 0) on {socket.gethostname()} ended without a word: killed" in said
    launch(folder, [["fit", "--config", "nodes.yaml", "--trainer.default_root_dir", "nodes/whole"]])
    assert adapter_bytes(folder / "nodes" / "lost") == adapter_bytes(folder / "nodes" / "whole")
    for column in ("step", "train_loss", "tokens_seen"):
        assert metrics(folder / "nodes" / "lost", column) == metrics(folder / "nodes" / "whole", column)
