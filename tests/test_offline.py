"""No command asks the network, as long as no hub id is named."""

import json
import os
import subprocess
import sys

import pytest
import yaml

PROGRAM = """
import socket, sys

asked = []

def refuse(*args, **kwargs):
    asked.append(args[-1] if args else kwargs)
    raise OSError("no network here")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse

from qlora_lightning.cli import main

assert main("fit --config c.yaml --trainer.max_steps 1".split()) == 0
assert main("fit --config c.yaml --trainer.max_steps 2 --ckpt_path last".split()) == 0
assert main("validate --config c.yaml".split()) == 0
assert main("predict --config c.yaml".split()) == 0
assert main("fit --config c.yaml --trainer.max_steps 1 --model.adapter run/adapter "
            "--trainer.default_root_dir again".split()) == 0
assert asked == [], asked
print("offline")
"""


@pytest.mark.slow
def test_fit_resume_validate_predict_and_going_on_with_an_adapter_ask_no_network(tiny_base, tmp_path):
    row = json.dumps({"instruction": "Say it.", "output": "it"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 4)
    (tmp_path / "one.jsonl").write_text(row)
    (tmp_path / "tiny").symlink_to(tiny_base)
    config = {
        "model": {"base": "tiny", "rank": 2},
        "data": {"train": "rows.jsonl", "val": "rows.jsonl", "predict": "one.jsonl", "batch_size": 2},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": "run"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    online = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment = {**online, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("offline")
