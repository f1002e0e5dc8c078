import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.base.folder import check_model_folder, weight_files
from qlora_lightning.support.errors import UserError


def _write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **changes}))


def test_a_llama_folder_passes(model_folder: Path) -> None:
    check_model_folder(model_folder, "tiny")
    _write_config(model_folder, sliding_window=None, layer_types=["full_attention"])
    check_model_folder(model_folder, "tiny")
    _write_config(model_folder, sliding_window=4096, use_sliding_window=False)
    check_model_folder(model_folder, "tiny")


def test_the_config_must_be_there_and_be_json(model_folder: Path) -> None:
    (model_folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"Base tiny: .*config\.json is not JSON"):
        check_model_folder(model_folder, "tiny")
    (model_folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"Base tiny: .*config\.json: expected a JSON object, found list\. Download"):
        check_model_folder(model_folder, "tiny")
    (model_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"Base tiny: .*found no config\.json in .*tiny-llama"):
        check_model_folder(model_folder, "tiny")
    (model_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"It is an adapter folder: give it as model\.adapter"):
        check_model_folder(model_folder, "tiny")


def test_another_model_type_is_refused(model_folder: Path) -> None:
    _write_config(model_folder, model_type="gemma2")
    with pytest.raises(UserError, match=r"Base tiny: expected model_type llama .* found 'gemma2'"):
        check_model_folder(model_folder, "tiny")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("attention_sinks", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_features_that_attention_would_swallow_are_refused_by_name(model_folder: Path, key: str, value: Any) -> None:
    _write_config(model_folder, **{key: value})
    with pytest.raises(UserError, match=f"Base tiny: .*{key}"):
        check_model_folder(model_folder, "tiny", weights=False)


def test_attention_sinks_among_the_tensors_are_refused(model_folder: Path) -> None:
    save_file({"model.layers.0.self_attn.sinks": torch.zeros(2)}, model_folder / "model.safetensors")
    with pytest.raises(UserError, match=r"attention sinks \(model\.layers\.0\.self_attn\.sinks"):
        check_model_folder(model_folder, "tiny")


def test_missing_weights_are_named(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "other.safetensors")
    with pytest.raises(UserError, match=r"Base tiny: expected model\.safetensors .*found other\.safetensors"):
        check_model_folder(model_folder, "tiny")
    (model_folder / "other.safetensors").unlink()
    with pytest.raises(UserError, match=r"Base tiny: .*found no \*\.safetensors file"):
        check_model_folder(model_folder, "tiny")
    check_model_folder(model_folder, "tiny", weights=False)


def test_pickles_are_refused_with_the_way_to_convert(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found only pytorch_model\.bin, a pickle.*save_pretrained"):
        check_model_folder(model_folder, "tiny")


def test_shards_that_the_index_names_must_exist(model_folder: Path) -> None:
    shard = model_folder / "model-00001-of-00002.safetensors"
    (model_folder / "model.safetensors").rename(shard)
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"1 of 2 shards are missing \(model-00002-of-00002\.safetensors"):
        check_model_folder(model_folder, "tiny")
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    assert weight_files(model_folder, "tiny") == [shard]
    index.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json is not an index of shards"):
        check_model_folder(model_folder, "tiny")


def test_weights_that_are_cut_off_are_refused(model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off"):
        check_model_folder(model_folder, "tiny")
