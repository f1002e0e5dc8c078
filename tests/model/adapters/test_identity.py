"""An adapter finds its base again and computes what was saved; another base, quantization or shape is rejected."""

import json
import shutil

import pytest

from qlora_lightning.model.load.build import find_adapter
from qlora_lightning.support.errors import UserError
from tests.equality import same
from tests.steps import make_module


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """A module of rank 4 whose B is not zero, and its adapter folder."""
    module = make_module(tiny_base, target_modules="attention")
    folder = tmp_path_factory.mktemp("run") / "adapter"
    module.save_adapter(folder)
    return module, folder


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_base_that_moved_is_found_where_it_was_loaded_from_or_by_another_name(made, tiny_base, tmp_path):
    folder = shutil.copytree(made[1], tmp_path / "run" / "adapter")
    change(folder / "qlora_lightning.json", base="./models/gone")
    assert find_adapter(folder.parent).base.folder == tiny_base
    change(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"The base of .* is not found\. Base './models/gone'.*name it with --base"):
        find_adapter(folder)
    assert find_adapter(folder, base=str(tiny_base)).base.folder == tiny_base


def test_training_continues_with_the_shape_of_the_folder(tiny_base, made):
    module, folder = made
    again = make_module(tiny_base, adapter=str(folder), rank=8)
    assert again.identity["adapter"] == module.identity["adapter"]
    again = make_module(
        tiny_base, adapter=str(folder), alpha=8.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    assert same(dict(again.state_dict()), dict(module.state_dict()))


def test_another_quantization_than_the_folders_is_rejected(tiny_base, made):
    with pytest.raises(UserError, match=r"with model\.quantization nf4, but here it is int8"):
        make_module(tiny_base, adapter=str(made[1]), quantization="int8")
