import json
import re
import subprocess
import sys

import pytest

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.support.errors import UserError

IDENTITY = {"format_version": 1, "base": "me/base", "adapter": {"rank": 2}, "revision": None}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qlora_lightning.json").write_text(json.dumps(IDENTITY))
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").touch()
    return tmp_path


def test_what_is_known_of_the_base_is_given(folder):
    assert read_identity(folder) == {"format_version": 1, "base": "me/base", "adapter": {"rank": 2}}


def test_it_is_read_without_torch(folder):
    code = f"""
import sys
from pathlib import Path
from qlora_lightning.base.adapter_folder import read_identity
print(read_identity(Path({str(folder)!r}))["base"], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["me/base", "False"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_adapter_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"is not an adapter folder: expected adapter_config.json.*missing {name}"):
        read_identity(folder)


def test_a_folder_of_another_tool_says_nothing_of_its_base(folder):
    (folder / "qlora_lightning.json").unlink()
    assert read_identity(folder) == {}


@pytest.mark.parametrize("name", ["adapter_config.json", "qlora_lightning.json"])
def test_files_that_are_no_json_are_refused(folder, name):
    (folder / name).write_text((folder / name).read_text()[:-9])
    with pytest.raises(UserError, match=f"{name} is not JSON, or it is cut off"):
        read_identity(folder)
    (folder / name).write_text("[]")
    with pytest.raises(UserError, match=f"{name}: expected a JSON object, found list"):
        read_identity(folder)


def test_a_newer_folder_is_refused(folder):
    (folder / "qlora_lightning.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match=r"format version 99.*update qlora_lightning"):
        read_identity(folder)


def test_another_kind_of_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="peft_type IA3: expected LORA"):
        read_identity(folder)


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("qlora_lightning.json", "base", 3, "base is 3, expected text"),
        ("qlora_lightning.json", "quantization", "q4", 'quantization is "q4", expected nf4 or fp4'),
        ("qlora_lightning.json", "adapter", [], "adapter is a list, expected an object"),
        ("qlora_lightning.json", "adapter", {"rank": "8"}, 'adapter.rank is "8", expected a whole number'),
        ("qlora_lightning.json", "data", {"settings": 3}, "data.settings is 3"),
        ("qlora_lightning.json", "data", {"settings": {"system": []}}, "data.settings.system is a list, expected text"),
        ("qlora_lightning.json", "format_version", "1", 'format_version is "1"'),
        ("adapter_config.json", "base_model_name_or_path", 3, "base_model_name_or_path is 3"),
        ("adapter_config.json", "r", "x", 'r is "x", expected a positive whole number up to 65,536'),
        ("adapter_config.json", "r", None, "r is missing"),
        ("adapter_config.json", "lora_alpha", -16, "lora_alpha is -16, expected a positive number up to 1,000,000"),
        ("adapter_config.json", "lora_alpha", [16], "lora_alpha is a list, expected a positive number up to 1,000,000"),
        ("adapter_config.json", "alpha_pattern", {"q_proj": -1}, "alpha_pattern.q_proj is -1, expected a positive"),
        ("adapter_config.json", "target_modules", 3, "target_modules is 3, expected text or a list"),
    ],
)
def test_values_of_wrong_types_are_refused(folder, name, key, value, words):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=re.escape(f"{name} is damaged: {words}")):
        read_identity(folder)
