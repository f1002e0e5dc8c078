"""An adapter folder finds its base again, and computes what was saved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lightning.model.opened_adapter import find_adapter, open_adapter
from qlora_lightning.support.errors import UserError
from tests.adapters import make_adapter


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, make_adapter(folder, tiny_base)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run" / "adapter")


def change(folder, file="qlora_lightning.json", **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


def test_by_its_own_or_its_run_folder_it_is_found_and_computes_what_was_saved(made, folder, tiny_base):
    for place in (folder, folder.parent):
        source = find_adapter(str(place))
        assert (source.folder, source.base.folder) == (folder, tiny_base)
        assert (source.quantization, source.double_quant, source.compute_dtype) == ("nf4", True, torch.float32)
        assert not source.is_stored_quantized
    ids, opened = torch.tensor([[5, 6, 7, 8]]), open_adapter(source).model.eval().cpu()
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, made[1](input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_base_that_moved_is_found_where_it_was_loaded_from_or_by_another_name(folder, tiny_base, tmp_path):
    change(folder, base="./models/gone")
    assert find_adapter(folder).base.folder == tiny_base
    change(folder, "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"The base of .* is not found\. Base './models/gone'.*name it with --base"):
        find_adapter(folder)
    assert find_adapter(folder, base=str(tiny_base)).base.folder == tiny_base


def test_another_base_is_refused(folder, tiny_base, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "model.norm.weight": 2 * tensors["model.norm.weight"]}, other / "model.safetensors")
    with pytest.raises(UserError, match="was trained on another base"):
        find_adapter(folder, base=str(other))


def test_a_folder_of_another_tool_is_opened_by_the_name_in_its_config(folder, tiny_base, tmp_path):
    (folder / "qlora_lightning.json").unlink()
    source = find_adapter(folder)
    assert (source.base.folder, source.quantization) == (tiny_base, None)
    change(folder, "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not name its base"):
        find_adapter(folder)
    with pytest.raises(UserError, match="is not an adapter folder"):
        find_adapter(tmp_path)
