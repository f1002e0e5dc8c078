"""What ``evaluate`` was asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.support.errors import UserError

_NAMED = re.compile(r"([\w.-]+)=(.+)")
# words of evaluation.json and predictions.jsonl
_TAKEN = ("base", "difference", "differences", "prompt", "expected", "row", "place", "source", "group")


@dataclass(frozen=True)
class Options:
    """The command's own options; those of ``fit`` go their usual way.

    Attributes:
        adapters: Folder by name; none: the run folder's.
        split: ``val`` or ``test``.
        rows: How many rows at most, all of them answered; ``None``: as during ``fit``.
        answered: How many rows at most are answered.
        max_new_tokens: Where an answer is cut; ``None``: chosen by the expected answers.
        batch_size: Rows that are answered together.
        scores: ``auto``, or names.
        group_by: Column to count rows by.
        show: How many of the hardest rows to print.
        out: Folder for all that is written.
        json: File for the figures.
    """

    adapters: dict[str, Path]
    split: str = "val"
    rows: int | None = None
    answered: int | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    scores: str | Sequence[str] | None = None
    group_by: str | None = None
    show: int | None = None
    out: Path | None = None
    json: Path | None = None

    def with_section(self, section: Any) -> "Options":
        """Take what was not asked for from the config's section ``evaluation``, so that it is as during ``fit``.

        Args:
            section: The callback ``Evaluation``.
        """
        return replace(
            self,
            answered=section.rows if self.rows is None else self.rows,
            max_new_tokens=self.max_new_tokens or section.max_new_tokens,
            batch_size=self.batch_size or section.batch_size,
            scores=self.scores or section.scores,
            show=section.samples if self.show is None else self.show,
        )

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
        given, equals, _ = value.partition("=")
        match = None if Path(value).expanduser().is_dir() else _NAMED.fullmatch(value)
        if match is None and equals and "/" not in given and not Path(value).expanduser().is_dir():
            raise UserError(_misnamed(value, given))
        folder = find_adapter_folder(match[2] if match else value)
        unnamed = "adapter" if len(values) == 1 else _name_of_run(folder)
        name = match[1] if match else unnamed
        if name in _TAKEN:
            raise UserError(f"--adapter {value}: an adapter cannot be called {name!r}. Give it another name: NAME=DIR.")
        if name in found:
            raise UserError(f"--adapter {value}: there are two of the name {name!r}. Tell them apart by NAME=DIR.")
        found[name] = folder
    return found


def _misnamed(value: str, name: str) -> str:
    what = "names no folder" if value.endswith("=") else f"{name!r} is no name: expected letters, digits, _, . and -"
    return f"--adapter {value}: {'there is no name before the =' if not name else what}. Write NAME=DIR, or DIR alone."


def _name_of_run(folder: Path) -> str:
    whole = folder.absolute()
    return (whole.parent if whole.name == "adapter" else whole).name
