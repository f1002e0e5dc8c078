from pathlib import Path

import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.model.checkpoint.format import (
    FORMAT_VERSION,
    KEY,
    OWN_PARTS,
    PARTS,
    find_foreign_class,
    known_settings,
    plain_settings,
    read_content,
)
from qlora_lightning.support.errors import UserError

FIRST = {  # what version 1 wrote when it was new: no key beside these
    "format_version": 1,
    "settings": {"base": "a", "rank": 3},
    "identity": {"base": "a", "fingerprint": "123", "quantization": "nf4"},
    "generators": {},
    "window": {},
}
WHOLE = {**{name: {} for name in PARTS}, KEY: FIRST}


def test_a_checkpoint_of_version_1_is_read(tmp_path):
    torch.save(WHOLE, tmp_path / "old.ckpt")
    content = read_content(torch.load(tmp_path / "old.ckpt", weights_only=True), "old.ckpt")
    assert content["settings"] == {"base": "a", "rank": 3}
    assert content["identity"] == FIRST["identity"]


@pytest.mark.parametrize("checkpoint", [{}, {KEY: None}, {KEY: {"settings": {}}}, {KEY: {"format_version": "1"}}])
def test_a_foreign_checkpoint_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"x.ckpt was not written by qlora_lightning"):
        read_content(checkpoint, "x.ckpt")


def test_a_newer_format_is_refused():
    with pytest.raises(UserError, match=rf"format version {FORMAT_VERSION + 1}.*update qlora_lightning"):
        read_content({KEY: {"format_version": FORMAT_VERSION + 1}}, "x.ckpt")


@pytest.mark.parametrize("part", [*PARTS, *OWN_PARTS])
def test_a_checkpoint_that_lacks_a_part_is_refused(part):
    checkpoint = {name: value for name, value in WHOLE.items() if name != part}
    checkpoint[KEY] = {name: value for name, value in FIRST.items() if name != part}
    with pytest.raises(UserError, match=rf"x.ckpt lacks \S*{part}, which every checkpoint of a run holds"):
        read_content(checkpoint, "x.ckpt")


@pytest.mark.parametrize(
    ("optimizer", "foreign"),
    [
        (None, None),
        ("torch.optim.SGD", None),
        ("torch.optim.adamw.AdamW", None),
        ({"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"eps": 1e-6}}, None),
        ({"class_path": "evil.X"}, "evil.X"),
        ("torch.optimizers.X", "torch.optimizers.X"),
        ("evil.torch.optim.SGD", "evil.torch.optim.SGD"),
        ("SGD", "SGD"),
    ],
)
def test_an_optimizer_counts_only_where_a_file_does_not_decide_what_is_imported(optimizer, foreign):
    assert find_foreign_class({"rank": 3, "optimizer": optimizer}) == foreign


class Loud(QLoRAModule):
    def __init__(self, loud: int = 1, **kwargs):
        super().__init__(**kwargs)


class Closed(QLoRAModule):
    def __init__(self, rank: int = 1):
        super().__init__("a", rank=rank)


def test_a_subclass_takes_its_own_arguments_and_those_that_it_hands_on():
    own = known_settings(QLoRAModule)
    assert {"base", "rank", "learning_rate"} <= own
    assert "kwargs" not in own
    assert known_settings(Loud) >= own | {"loud"}
    assert known_settings(Closed) == {"rank"}


def test_what_weights_only_would_not_read_again_is_not_stored(tmp_path):
    settings = {"path": Path("a/b"), "layers": (1, 2), "options": {"deep": [None, True, 0.5]}, "odd": [object()]}
    torch.save(plain_settings(settings), tmp_path / "settings")
    assert torch.load(tmp_path / "settings", weights_only=True) == {
        "path": "a/b",
        "layers": [1, 2],
        "options": {"deep": [None, True, 0.5]},
    }
