"""An adapter folder says what it belongs to, is read without torch, and refused by name if it is damaged."""

import json
import re
import subprocess
import sys

import pytest

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.support.errors import UserError

IDENTITY = {"format_version": 1, "base": "me/base", "adapter": {"rank": 2}, "revision": None}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
OURS, PEFTS = "qlora_lightning.json", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / OURS).write_text(json.dumps(IDENTITY))
    (tmp_path / PEFTS).write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").touch()
    return tmp_path


def test_what_is_known_of_the_base_is_read_without_torch(folder):
    code = f"""
import sys
from pathlib import Path
from qlora_lightning.base.adapter_folder import read_identity
print(read_identity(Path({str(folder)!r})), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'format_version': 1, 'base': 'me/base', 'adapter': {'rank': 2}} False\n"
    (folder / OURS).unlink()  # another tool's
    assert read_identity(folder) == {}


@pytest.mark.parametrize("name", [PEFTS, "adapter_model.safetensors"])
def test_a_folder_without_adapter_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"is not an adapter folder: expected adapter_config.json.*missing {name}"):
        read_identity(folder)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (OURS, {"base": 3}, "base is 3, expected text"),
        (OURS, {"quantization": "q4"}, 'quantization is "q4", expected nf4 or fp4'),
        (OURS, {"adapter": []}, "adapter is a list, expected an object"),
        (OURS, {"format_version": "1"}, 'format_version is "1"'),
        (OURS, {"format_version": 99, "base": 3}, "has format version 99"),
        (PEFTS, {"peft_type": "IA3"}, "holds an adapter of peft_type IA3: expected LORA"),
        (PEFTS, {"r": "x"}, 'r is "x", expected a positive whole number up to 65,536'),
        (PEFTS, {"r": None}, "r is missing"),
        (PEFTS, {"lora_alpha": -16}, "lora_alpha is -16, expected a positive number up to 1,000,000"),
        (PEFTS, {"alpha_pattern": {"q_proj": -1}}, "alpha_pattern.q_proj is -1, expected a positive"),
    ],
)
def test_what_cannot_be_computed_with_is_refused(folder, name, changes, words):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match=re.escape(words)):
        read_identity(folder)


@pytest.mark.parametrize("name", [PEFTS, OURS])
def test_files_that_are_cut_off_are_refused(folder, name):
    (folder / name).write_text((folder / name).read_text()[:-9])
    with pytest.raises(UserError, match=f"{name} is not JSON, or it is cut off.*Copy the adapter folder again"):
        read_identity(folder)
