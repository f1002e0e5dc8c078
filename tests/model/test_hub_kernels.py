"""No code of layers comes from the hub, which transformers fetches by default since 5.25: layers run fused, offline."""

import os

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from qlora_lightning import load_base
from qlora_lightning.cli import main
from qlora_lightning.sources.folders import open_base
from tests.adapters import make_run
from tests.processes import run_python
from tests.random_base import save_random_llama, save_tokenizer
from tests.steps import make_module


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """Makes any transformers take kernels of the hub by default, as 5.25 does; what each loaded model was told."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    found, load = [], PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, use_kernels=True, **options):
        found.append(use_kernels)
        return load(cls, *args, use_kernels=use_kernels, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.delenv("USE_HUB_KERNELS")
    return found


def test_no_door_takes_kernels_of_the_hub_and_layers_run_fused(tmp_path, taken):
    save_tokenizer(tmp_path / "base", ["Count to 1 2 3 4."], size=512)
    save_random_llama(tmp_path / "base", torch.float32, hidden_size=64, intermediate_size=128)
    make_run(tmp_path / "run", tmp_path / "base")  # quantizes the base, and loads it again
    merge = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--gguf", "f16"]
    assert main(merge) == 0  # which loads what it wrote
    base = open_base(str(tmp_path / "merged" / "gguf" / "model-f16.gguf")).folder
    module = make_module(base, quantization="none")
    assert load_base(str(base), quantization="nf4", cache=False).model.use_kernels is False
    assert set(module.choose_layers().layers.values()) == {None}
    assert taken
    assert not any(taken)


_KERNELS = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def called(*args, **options):
        if not name.startswith("use_"):  # which mark layers
            print("called", name)
        return lambda marked: marked

    return called
"""
_FIT = """
import socket, sys

def refuse(*args, **options):
    print("called", args)
    raise OSError("no network here")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse

from lightning import Trainer
from qlora_lightning import InstructionDataModule, QLoRAModule
from transformers.utils.import_utils import is_kernels_available

base, rows = sys.argv[1:]
module = QLoRAModule(base)
trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, InstructionDataModule(train=rows, tokenizer=base))
module.eval()
module.answer([[5, 6, 7]], [], max_new_tokens=3)
print("kernels:", is_kernels_available(), "reasons:", {*module.choose_layers().layers.values()})
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_fit_asks_no_network_whether_the_package_for_kernels_is_there_or_not(
    with_kernels, tiny_base, rows_file, tmp_path
):
    hidden = ("HF_HUB_OFFLINE", "USE_HUB_KERNELS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if with_kernels:
        metadata = tmp_path / "site" / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
        metadata.mkdir(parents=True)
        (metadata.parent / "kernels.py").write_text(_KERNELS)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
        (metadata / "top_level.txt").write_text("kernels\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(metadata.parent), os.environ.get("PYTHONPATH", "")])
    done = run_python("-c", _FIT, tiny_base, rows_file, env=environment, cwd=tmp_path)
    assert "reasons: {None}" in done.stdout
    assert "called" not in done.stdout
    if with_kernels:
        assert "kernels: True" in done.stdout
