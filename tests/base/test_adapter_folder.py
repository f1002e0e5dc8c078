"""An adapter folder says what it belongs to, and is refused by name if it is damaged."""

import json
import re

import pytest

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.support.errors import UserError

IDENTITY = {"format_version": 1, "base": "me/base", "adapter": {"rank": 2}, "revision": None}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
OURS, PEFTS, WEIGHTS = "qlora_lightning.json", "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    for name, content in ((OURS, IDENTITY), (PEFTS, CONFIG), (WEIGHTS, {})):
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_what_is_known_of_the_base_is_read_and_of_another_tools_folder_nothing(folder):
    assert read_identity(folder) == {"format_version": 1, "base": "me/base", "adapter": {"rank": 2}}
    (folder / OURS).unlink()
    assert read_identity(folder) == {}


def change(**values):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(file):
    file.write_text(file.read_text()[:-9])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (PEFTS, lambda file: file.unlink(), "is not an adapter folder: expected .* missing adapter_config.json"),
        (WEIGHTS, lambda file: file.unlink(), "is not an adapter folder: expected .* missing adapter_model.safetens"),
        (PEFTS, cut, f"{PEFTS} is not JSON, or it is cut off.*Copy the adapter folder again"),
        (OURS, cut, f"{OURS} is not JSON, or it is cut off.*Copy the adapter folder again"),
        (OURS, change(format_version=99), "has format version 99"),
        (PEFTS, change(peft_type="IA3"), "holds an adapter of peft_type IA3: expected LORA"),
    ],
)
def test_what_is_missing_cut_off_or_cannot_be_computed_with_is_refused(folder, name, damage, words):
    damage(folder / name)
    with pytest.raises(UserError, match=words) as refused:
        read_identity(folder)
    assert re.search(re.escape(str(folder)), str(refused.value))
