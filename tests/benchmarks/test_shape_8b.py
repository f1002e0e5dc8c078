import pytest

from qlora_lightning.support.errors import UserError
from tests.benchmarks.shape_8b import check_folder, make_config


def test_a_base_of_another_number_of_layers_is_refused_with_the_way_out(tmp_path):
    make_config(4).save_pretrained(tmp_path)
    check_folder(tmp_path, 4)
    with pytest.raises(UserError, match=r"num_hidden_layers 32, found 4; give that as --llama-8b-layers, or name anot"):
        check_folder(tmp_path, 32)


def test_a_base_whose_making_was_killed_is_made_again(tmp_path):
    (tmp_path / "model-00003.safetensors").touch()
    check_folder(tmp_path, 32)
    check_folder(tmp_path / "not there yet", 32)
