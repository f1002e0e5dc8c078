import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_lightning.base import fingerprint as fingerprint_folder
from qlora_lightning.base.fingerprint import fingerprint
from qlora_lightning.support.errors import UserError


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> Path:
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_sharding_does_not_change_the_fingerprint(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    one, two, three = (_save(tmp_path / str(shards), tensors, shards) for shards in (1, 2, 3))
    assert fingerprint(one) == fingerprint(two) == fingerprint(three)
    assert len(fingerprint(one)) == 64


def test_one_value_one_name_or_one_dtype_changes_it(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["model.norm.weight"][3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    renamed = dict(tensors)
    renamed["model.norm2.weight"] = renamed.pop("model.norm.weight")
    recast = {**tensors, "model.norm.weight": tensors["model.norm.weight"].view(torch.int32)}
    reshaped = {**tensors, "model.norm.weight": tensors["model.norm.weight"].view(2, 4)}
    variants = [tensors, changed, renamed, recast, reshaped]
    folders = [_save(tmp_path / str(number), variant, 1) for number, variant in enumerate(variants)]
    assert len({fingerprint(folder) for folder in folders}) == 5


def test_the_result_is_kept_until_a_file_changes(
    model_folder: Path, cache: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint(model_folder)
    (kept,) = (cache / "fingerprints").iterdir()
    kept.write_text(json.dumps({"fingerprint": "from the cache"}))
    assert fingerprint(model_folder) == "from the cache"
    kept.write_text("{")
    assert fingerprint(model_folder) == first
    save_file({**tensors, "extra": torch.zeros(1)}, model_folder / "model.safetensors")
    assert fingerprint(model_folder) != first


def test_a_cache_that_cannot_be_written_only_costs_time(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint(model_folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "file"))
    assert fingerprint(model_folder) == first


def test_a_tensor_in_two_shards_is_refused(model_folder: Path) -> None:
    data = (model_folder / "model.safetensors").read_bytes()
    (model_folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        (model_folder / name).write_bytes(data)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"found lm_head\.weight in a\.safetensors and in b\.safetensors"):
        fingerprint(model_folder)


def test_the_package_exports_the_function_and_not_its_module() -> None:
    assert fingerprint_folder is fingerprint
