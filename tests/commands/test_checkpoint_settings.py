import csv
import shutil

import pytest
import torch
import yaml

from qlora_lightning.cli import main
from qlora_lightning.commands.training import read_stored_settings
from qlora_lightning.support.errors import UserError

CONFIG = {
    "seed_everything": 3,
    "model": {"base": "tiny", "schedule": "constant", "warmup_ratio": 0.0, "compute_dtype": "fp32"},
    "data": {"train": "rows.jsonl", "batch_size": 2},
    "adapter_checkpoint": {"every_n_train_steps": 1},
    "gpu_memory": None,
    "throughput": None,
    "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "default_root_dir": "run"},
}
LAST = "run/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def stopped(tiny_base, tmp_path_factory):
    """A run of two steps whose rank and learning rate stood on the command line."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "rows.jsonl").write_text('{"instruction": "Say it.", "output": "it"}\n' * 8)
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "tiny").symlink_to(tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = "fit --config c.yaml --trainer.max_steps 2 --model.rank 3 --model.learning_rate 0.25"
        assert main(command.split()) == 0
    return folder


@pytest.fixture
def resume(stopped, tmp_path, monkeypatch, capsys):
    """Go on with `last` in a copy of the folder; gives what was printed, and the learning rate of the last step."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(arguments=""):
        capsys.readouterr()
        command = f"fit --config c.yaml --ckpt_path last --trainer.max_steps 3 {arguments}"
        assert main(command.split()) == 0
        with open("run/metrics.csv", newline="") as handle:
            rates = [row["learning_rate"] for row in csv.DictReader(handle) if row["learning_rate"]]
        assert len(rates) == 3
        return capsys.readouterr().out, float(rates[-1])

    return run


def test_what_neither_config_nor_command_line_says_is_the_checkpoints(resume):
    out, rate = resume()
    assert rate == 0.25
    assert "model." not in out.split("Settings that differ")[1].split("\n\n")[0]
    assert "trainer.max_steps: 2 → 3" in out
    stored = torch.load(LAST, weights_only=True)["qlora_lightning"]["settings"]
    assert (stored["rank"], stored["learning_rate"]) == (3, 0.25)


def test_the_command_line_beats_the_checkpoint_and_that_is_told(resume):
    out, rate = resume("--model.learning_rate 0.125 --model.weight_decay 0.5")
    assert rate == 0.125
    assert "model.learning_rate: 0.25 → 0.125" in out
    assert "model.weight_decay: 0.0 → 0.5" in out
    (group,) = torch.load(LAST, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.5


def test_the_config_beats_the_checkpoint(resume, tmp_path):
    config = {**CONFIG, "model": {**CONFIG["model"], "learning_rate": 0.5}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    out, rate = resume()
    assert rate == 0.5
    assert "model.learning_rate: 0.25 → 0.5" in out


def test_code_that_comes_with_a_base_is_never_allowed_by_a_file(stopped, tmp_path):
    checkpoint = torch.load(stopped / LAST, weights_only=True)
    checkpoint["qlora_lightning"]["settings"] |= {"trust_remote_code": True, "of_a_subclass": 1}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    settings = read_stored_settings(tmp_path / "other.ckpt", {})
    assert settings["rank"] == 3
    assert not {"trust_remote_code", "of_a_subclass"} & settings.keys()


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"foreign.ckpt was not written by qlora_lightning"):
        read_stored_settings(tmp_path / "foreign.ckpt", {})


def test_a_file_does_not_decide_which_module_is_imported(stopped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(stopped)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["qlora_lightning"]["settings"]["optimizer"] = {"class_path": "evil.X", "init_args": {}}
    other = tmp_path / "other.ckpt"
    torch.save(checkpoint, other)
    assert main(["validate", "--config", "c.yaml", "--ckpt_path", str(other)]) == 2
    told = f"{other} names the optimizer evil.X, and a file must not decide which module is imported"
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "ran").exists()
    assert "optimizer" not in read_stored_settings(other, {"optimizer": "torch.optim.SGD"})
    checkpoint["qlora_lightning"]["settings"]["optimizer"] = "torch.optim.SGD"
    torch.save(checkpoint, other)
    assert read_stored_settings(other, {})["optimizer"] == "torch.optim.SGD"
