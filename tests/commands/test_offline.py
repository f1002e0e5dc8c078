"""No command asks the network, as long as no hub id is named."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import socket

asked = []

def refuse(*args, **kwargs):
    asked.append(args[-1] if args else kwargs)
    raise OSError("no network here")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse

from qlora_lightning.cli import main

assert main("fit --config c.yaml --ckpt_path last --trainer.max_epochs 2".split()) == 0
assert main("validate --config c.yaml".split()) == 0
assert main("predict --config c.yaml".split()) == 0
assert main("fit --config c.yaml --model.adapter run/adapter --trainer.default_root_dir again".split()) == 0
assert asked == [], asked
print("offline")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("command")
def test_fit_resume_validate_predict_and_more_training_of_an_adapter_ask_no_network(tmp_path):
    online = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment = {**online, "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("offline")
