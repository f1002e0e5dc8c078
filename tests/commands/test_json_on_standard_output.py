"""Every command that writes JSON: what is piped is that alone, and the tables go to standard error."""

import json

import pytest

from qlora_lightning.cli import main
from tests.adapters import make_run

TRAINING = "--config run/config.yaml --data.train run/val.jsonl --data.batch_size 2"
LINES = {
    "chat": "chat --adapter run/adapter --prompt x --max-new-tokens 2",
    "chat --compare": "chat --adapter run/adapter --prompt x --max-new-tokens 2 --compare",
    "evaluate": "evaluate --adapter run/adapter --rows 2 --max-new-tokens 2",
    "lr-find": f"lr-find {TRAINING} --steps 13 --max-lr 1e-3",
    "merge": "merge --adapter run/adapter --out merged --rows 1",
    "plan": "plan --adapter run/adapter",
    "profile": f"profile {TRAINING} --steps 1",
    "report": "report run",
    "sweep-rank": f"sweep-rank {TRAINING} --ranks 2,4 --trainer.max_steps 1 --trainer.default_root_dir sweep",
}


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_run(folder / "run", tiny_base)
    (folder / "run" / "metrics.csv").write_text("step,train_loss\n1,2.5\n")
    return folder


@pytest.mark.parametrize("name", LINES)
def test_it_can_be_piped(name, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    assert main([*LINES[name].split(), "--json", "/dev/stdout" if name == "chat" else "-"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)
    assert shown.err
    assert not (place / "-").exists()
