"""Any base as an ordinary transformers folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_lightning.base.model_folder import check_model_folder
from qlora_lightning.base.resolve import resolve_base
from qlora_lightning.base.unpack import unpack_gguf


@dataclass(frozen=True)
class BaseFolder:
    """A checked transformers folder: ``folder`` to load from, ``name`` as the user wrote it, ``kind`` as it came.

    ``revision`` is the commit of a hub snapshot, else None.
    """

    name: str
    folder: Path
    kind: Literal["hub", "folder", "gguf"]
    revision: str | None


def open_base(name: str, revision: str | None = None, *, weights: bool = True) -> BaseFolder:
    """Find a base, unpack it where it is a GGUF, and check what is there.

    Args:
        name: a hub id, a folder, a ``.gguf`` file, or ``package:NAME``.
        revision: branch, tag or commit of a hub id.
        weights: False is enough for config and tokenizer: it neither downloads nor checks the weights.

    Raises:
        UserError: there is no such base, or not one that can be trained here.
    """
    source = resolve_base(name, revision, weights=weights)
    folder = unpack_gguf(source) if source.kind == "gguf" else source.path
    check_model_folder(folder, name, weights=weights)
    return BaseFolder(name, folder, source.kind, source.revision)
