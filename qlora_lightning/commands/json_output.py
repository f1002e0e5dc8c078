"""``--json FILE`` of a command: the name is checked at the start, the file written whole at the end."""

import json
from pathlib import Path
from typing import Any

from qlora_lightning.errors import UserError
from qlora_lightning.safe_file import write_whole


def json_file(name: str | None) -> Path | None:
    """Check the file's name before a second is spent.

    Raises:
        UserError: There is no such folder, or it is no file.
    """
    if name is None:
        return None
    file = Path(name)
    if not file.parent.is_dir():
        raise UserError(f"--json {name}: there is no folder {file.parent}.")
    if file.is_dir():
        raise UserError(f"--json {name}: that is a folder; name a file.")
    return file


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write figures for other programs to read.

    Raises:
        UserError: The disk does not take them.
    """
    try:
        write_whole(file, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{file} could not be written: {error.strerror}.") from error
