import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora_lightning.errors import UserError
from qlora_lightning.model.loss import LossSums
from qlora_lightning.model.resume import FORMAT_VERSION, KEY, ExactResume, check_identity, read_content
from qlora_lightning.model.window import Window

OWN = {"base": "a", "fingerprint": "123", "quantization": "nf4"}


class Module(nn.Module):
    """What ExactResume asks of a module."""

    def __init__(self, **identity):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.identity = {**OWN, **identity}
        self.window = Window()


def trainer(fn="fit"):
    return SimpleNamespace(state=SimpleNamespace(fn=fn))


def open_window(module):
    module.window.add(LossSums(torch.tensor(3.0), torch.tensor(2), torch.tensor(0)), most=2, row_ids=torch.tensor([4]))
    module.weight.grad = torch.tensor([1.0, 2.0])


def save(module, place):
    checkpoint = {"hyper_parameters": {"rank": 3}, "epoch": 1}
    ExactResume().on_save_checkpoint(trainer(), module, checkpoint)
    torch.save(checkpoint, place)
    return torch.load(place, weights_only=True)


def test_settings_lie_under_our_own_key(tmp_path):
    checkpoint = save(Module(), tmp_path / "checkpoint")
    assert "hyper_parameters" not in checkpoint
    assert checkpoint["epoch"] == 1
    content = read_content(checkpoint, "The checkpoint")
    assert content["settings"] == {"rank": 3}
    assert content["identity"] == OWN
    assert content["format_version"] == FORMAT_VERSION


def test_window_and_generators_go_on_with_the_first_batch(tmp_path):
    module = Module()
    open_window(module)
    checkpoint = save(module, tmp_path / "checkpoint")
    expected = [random.random(), torch.rand(1).item()]

    again, resume = Module(), ExactResume()
    resume.on_load_checkpoint(trainer(), again, checkpoint)
    torch.rand(9)  # what making loaders draws
    assert not again.window.is_open
    resume.on_train_batch_start(trainer(), again, {}, 0)
    assert [random.random(), torch.rand(1).item()] == expected
    assert again.weight.grad.tolist() == [1.0, 2.0]
    assert again.window.row_ids == [4]

    again.window.clear()
    resume.on_train_batch_start(trainer(), again, {}, 1)
    assert not again.window.is_open  # once only


def test_evaluation_restores_nothing(tmp_path):
    module = Module()
    open_window(module)
    checkpoint = save(module, tmp_path / "checkpoint")
    again, resume = Module(), ExactResume()
    resume.on_load_checkpoint(trainer("validate"), again, checkpoint)
    resume.on_train_batch_start(trainer(), again, {}, 0)
    assert not again.window.is_open


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    checkpoint = save(Module(), tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"The checkpoint was trained on another base: its fingerprint is 123"):
        ExactResume().on_load_checkpoint(trainer(), Module(fingerprint="999"), checkpoint)


@pytest.mark.parametrize(("name", "other"), [("fingerprint", "999"), ("quantization", "int8")])
def test_another_fingerprint_or_quantization_is_refused(name, other):
    with pytest.raises(UserError, match=f"It was trained on another base: its {name} is {other}"):
        check_identity({**OWN, name: other}, OWN, "It")


@pytest.mark.parametrize("stored", [{}, {"base": "b", "fingerprint": "123"}, OWN])
def test_what_is_not_known_or_only_named_otherwise_passes(stored):
    check_identity(stored, OWN, "It")


@pytest.mark.parametrize("checkpoint", [{}, {KEY: None}, {KEY: {"settings": {}}}])
def test_a_foreign_checkpoint_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"x.ckpt was not written by qlora_lightning"):
        read_content(checkpoint, "x.ckpt")


def test_a_newer_format_is_refused():
    with pytest.raises(UserError, match=rf"format version {FORMAT_VERSION + 1}.*update qlora_lightning"):
        read_content({KEY: {"format_version": FORMAT_VERSION + 1}}, "x.ckpt")
