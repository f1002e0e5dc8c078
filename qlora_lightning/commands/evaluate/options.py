"""What ``evaluate`` was asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lightning.errors import UserError

_NAMED = re.compile(r"([\w.-]+)=(.+)")
_TAKEN = ("base", "difference", "differences")  # words of evaluation.json


@dataclass(frozen=True)
class Options:
    """The command's own options; those of ``fit`` go their usual way.

    Attributes:
        adapters: Folder by name; none: the run folder's.
        split: ``val`` or ``test``.
        rows: How many rows at most.
        max_new_tokens: Where an answer is cut; ``None``: chosen by the expected answers.
        batch_size: Rows that are answered together.
        scores: ``auto``, or names with commas between them.
        group_by: Column to count rows by.
        show: How many of the hardest rows to print.
        out: Folder for all that is written.
        json: File for the figures.
    """

    adapters: dict[str, Path]
    split: str = "val"
    rows: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 64
    scores: str = "auto"
    group_by: str | None = None
    show: int = 3
    out: Path | None = None
    json: Path | None = None

    def files(self) -> tuple[Path, Path]:
        """The two files in ``out``: figures and predictions."""
        folder = self.out or Path()
        return folder / "evaluation.json", folder / "predictions.jsonl"


def named_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Give each adapter folder a name: the user's, else ``adapter``; of several, that of the run folder.

    Raises:
        UserError: Two have the same name, or one has a name that means something else.
    """
    found: dict[str, Path] = {}
    for value in values:
        match = None if Path(value).expanduser().is_dir() else _NAMED.fullmatch(value)
        folder = Path(match[2] if match else value).expanduser()
        unnamed = "adapter" if len(values) == 1 else _name_of_run(folder)
        name = match[1] if match else unnamed
        if name in _TAKEN:
            raise UserError(f"--adapter {value}: an adapter cannot be called {name!r}. Give it another name: NAME=DIR.")
        if name in found:
            raise UserError(f"--adapter {value}: there are two of the name {name!r}. Tell them apart by NAME=DIR.")
        found[name] = folder
    return found


def _name_of_run(folder: Path) -> str:
    whole = folder.absolute()
    return (whole.parent if whole.name == "adapter" else whole).name
