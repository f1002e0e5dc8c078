import os
from pathlib import Path

import pytest
import transformers.distributed.mixin as transformers_mixin
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lightning.base.tensors import save_model


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config)


def test_a_process_that_is_not_the_first_writes_too(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(transformers_mixin, "_get_torch_distributed_rank", lambda: 1)
    (tmp_path / "theirs").mkdir()
    model.save_pretrained(tmp_path / "theirs")
    assert list((tmp_path / "theirs").iterdir()) == []  # what there would be without it
    save_model(model, tmp_path / "ours")
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "ours").iterdir()}
    assert not model.should_save_on_this_rank(is_main_process=True)  # put back


def test_a_folder_without_weights_is_no_model(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "save_pretrained", lambda folder: None)
    with pytest.raises(RuntimeError, match="wrote no weights"):
        save_model(model, tmp_path)


def test_weights_have_the_mode_of_the_umask(model: LlamaForCausalLM, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_model(model, tmp_path)
    finally:
        os.umask(old)
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o640"}
