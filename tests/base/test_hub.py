from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qlora_lightning.base.find import download_snapshot
from qlora_lightning.support.errors import UserError


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def _http_error(kind: type[Exception]) -> Exception:
    """An error of the hub without the HTTP answer that its constructor asks for."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (_http_error(errors.GatedRepoError), "Base org/name is gated .*`hf auth login`"),
        (_http_error(errors.RepositoryNotFoundError), "Base org/name is not .* found on the Hugging Face hub"),
        (_http_error(errors.RevisionNotFoundError), r"Base org/name has no revision 'v9' .* model\.revision"),
        (errors.LocalEntryNotFoundError("x"), "Base org/name is not in .* cannot be reached"),
        (ValueError("first\nsecond"), "Base org/name could not be downloaded: ValueError: first$"),
    ],
)
def test_each_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _fail_with(monkeypatch, error)
    with pytest.raises(UserError, match=sentence):
        download_snapshot("org/name", "v9", weights=True)


def test_offline_without_a_snapshot_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"Base org/name is not whole .* HF_HUB_OFFLINE"):
        download_snapshot("org/name", None, weights=True)


def test_offline_a_whole_snapshot_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert download_snapshot("org/name", None, weights=False).resolve() == snapshot.resolve()


def test_only_safetensors_are_asked_for_and_only_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **kwargs: Any) -> str:
        asked.append(allow_patterns)
        return "/hub/abc"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert download_snapshot("org/name", None, weights=True) == Path("/hub/abc")
    download_snapshot("org/name", None, weights=False)
    assert set(asked[0]) - set(asked[1]) == {"*.safetensors", "model.safetensors.index.json"}
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked[0])
