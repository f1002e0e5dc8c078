import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora_lightning.model.checkpoint.format import PARTS, read_content
from qlora_lightning.model.checkpoint.resume import ExactResume
from qlora_lightning.model.loss import LossSums
from qlora_lightning.model.window import Window
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import FORMAT_VERSION

OWN = {"base": "a", "fingerprint": "123", "quantization": "nf4"}


class Module(nn.Module):
    """What ExactResume asks of a module."""

    def __init__(self, identity=None, **settings):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.identity = {**OWN, **(identity or {})}
        self.hparams = {"rank": 3, **settings}
        self.window = Window()

    def check_base(self, wait=True):
        """It is sound."""


def trainer(fn="fit", data=None, **settings):
    data = SimpleNamespace(identity=data) if data else None
    own = {"global_rank": 0, "world_size": 1, "is_global_zero": True, "max_epochs": 1}
    own |= {"max_steps": -1, "accumulate_grad_batches": 2}
    own |= {"enable_validation": True, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    stage = {"state": SimpleNamespace(fn=fn), "training": True, "validating": False, "sanity_checking": False}
    epochs = SimpleNamespace(current=SimpleNamespace(ready=1, processed=0))  # in the first one
    own["fit_loop"] = SimpleNamespace(epoch_progress=epochs)
    watched = {"callbacks": [], "callback_metrics": {}}
    return SimpleNamespace(**{"datamodule": data, **own, **watched, **stage, **settings})


def open_window(module):
    module.window.add(LossSums(torch.tensor(3.0), torch.tensor(2), torch.tensor(0)), most=2, row_ids=[4])
    module.weight.grad = torch.tensor([1.0, 2.0])


def save(module, place, inside=False, **options):
    counts = {"ready": 2, "started": 2, "processed": 2, "completed": 2}
    none = {"current": {name: 0 for name in counts}}
    loops = {
        "epoch_progress": none,
        "epoch_loop.batch_progress": {"current": counts, "is_last_batch": not inside},
        "epoch_loop.val_loop.batch_progress": none,
    }
    checkpoint = {**{key: [] for key in PARTS}, "global_step": 3, "loops": {"fit_loop": loops}}
    checkpoint |= {"hyper_parameters": module.hparams, "epoch": 1}
    ExactResume().on_save_checkpoint(trainer(**options), module, checkpoint)
    torch.save(checkpoint, place)
    return torch.load(place, weights_only=True)


def test_settings_lie_under_our_own_key(tmp_path):
    checkpoint = save(Module(), tmp_path / "checkpoint")
    assert "hyper_parameters" not in checkpoint
    assert checkpoint["epoch"] == 1
    content = read_content(checkpoint, "The checkpoint")
    assert content["settings"] == {"rank": 3}
    assert content["identity"] == {**OWN, "data": {}}
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


def test_an_open_window_is_refused_for_another_accumulation_and_a_closed_one_is_not(tmp_path, capsys):
    module = Module()
    closed = save(module, tmp_path / "closed")
    open_window(module)
    opened, now = save(module, tmp_path / "open"), trainer(accumulate_grad_batches=3)
    with pytest.raises(UserError, match="accumulate_grad_batches was 2 and is 3"):
        ExactResume().on_load_checkpoint(now, Module(), opened)
    ExactResume().on_load_checkpoint(now, Module(), closed)
    assert "trainer.accumulate_grad_batches: 2 → 3" in capsys.readouterr().out
    ExactResume().on_load_checkpoint(trainer("validate", accumulate_grad_batches=3), Module(), opened)


def test_a_validation_that_will_not_be_run_is_told(tmp_path, capsys):
    checkpoint = {**save(Module(), tmp_path / "checkpoint"), "global_step": 4}
    now = trainer(max_steps=4)
    ExactResume().on_load_checkpoint(now, Module(), checkpoint)
    assert "validate --ckpt_path last" not in capsys.readouterr().out
    checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]["ready"] = 1
    ExactResume().on_load_checkpoint(now, Module(), checkpoint)
    assert "and is not run. `qlora-lightning validate --ckpt_path last` judges" in capsys.readouterr().out


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
    with pytest.raises(UserError, match=r"The checkpoint was trained on another base: a \(weights 123\) there"):
        ExactResume().on_load_checkpoint(trainer(), Module({"fingerprint": "999"}), checkpoint)


DATA = {"tokenizer": "t1", "chat_template": "c1", "train": "r1", "val": "v1", "settings": {"batch_size": 2}}


@pytest.mark.parametrize(
    ("inside", "fn", "change", "refused"),
    [
        (True, "fit", {"train": "r2"}, "saved inside an epoch with other training samples"),
        (True, "fit", {"train": "r2", "tokenizer": "t2"}, "saved inside an epoch with other"),
        # where samples are not known, what makes them
        (True, "fit", {"tokenizer": "t2", "train": None}, "saved inside an epoch with other tokenizer"),
        (True, "fit", {"tokenizer": "t2"}, None),  # the same samples all the same
        (True, "fit", {"val": "v2"}, None),
        (False, "fit", {"train": "r2"}, None),
        (True, "validate", {"train": "r2", "tokenizer": "t2"}, None),
        (True, "fit", {}, None),
    ],
)
def test_other_data_are_refused_inside_an_epoch_and_else_told(tmp_path, capsys, inside, fn, change, refused):
    checkpoint = save(Module(), tmp_path / "checkpoint", inside, data=DATA)
    resume, now = ExactResume(), trainer(fn, data={**DATA, **change})
    now.datamodule.accept_changed_data = True
    if refused:
        with pytest.raises(UserError, match=refused):
            resume.on_load_checkpoint(now, Module(), checkpoint)
        return
    resume.on_load_checkpoint(now, Module(), checkpoint)
    told = capsys.readouterr().out
    for name, words in (("train", "training samples (r1 there, r2 here)"), ("val", "validation samples (v1 there")):
        assert (words in told) == (name in change and fn == "fit")
    assert ("tokenizer (t1 there, t2 here)" in told) == ("tokenizer" in change)
    assert bool(told) == bool(change)


def test_settings_that_differ_from_the_checkpoints_are_told_a_line_each(tmp_path, capsys):
    checkpoint = save(Module(learning_rate=0.1, layers="all"), tmp_path / "checkpoint", data=DATA, precision="32-true")
    now = trainer(data={**DATA, "settings": {"batch_size": 4}}, precision="bf16-mixed")
    ExactResume().on_load_checkpoint(now, Module(learning_rate=0.5, layers="[all]"), checkpoint)
    assert capsys.readouterr().out.splitlines() == [
        "Settings that differ from the checkpoint's (there → now):",
        "  model.layers: all → [all]",
        "  model.learning_rate: 0.1 → 0.5",
        "  data.batch_size: 2 → 4",
        "  trainer.precision: 32-true → bf16-mixed",
    ]


def test_settings_of_the_checkpoint_that_are_unknown_now_are_ignored_with_a_line(tmp_path, capsys):
    checkpoint = save(Module(gone=1), tmp_path / "checkpoint")
    ExactResume().on_load_checkpoint(trainer(), Module(), checkpoint)
    assert "does not know, ignored: gone." in capsys.readouterr().out


def test_an_adapter_folder_of_another_tokenizer_is_told(capsys):
    start = {"adapter": "old/adapter", "data": {**DATA, "tokenizer": "t2", "train": "r2"}}
    ExactResume().on_test_start(trainer("test", data=DATA), Module({"trained_from": start}))
    told = capsys.readouterr().out
    assert told == "Other than in the adapter folder old/adapter: tokenizer (t2 there, t1 here).\n"
