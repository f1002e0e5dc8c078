"""``manifest.json``: what a run was, in a form that programs read."""

import json
from pathlib import Path
from typing import Any

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import read_json_object, write_whole

NAME = "manifest.json"
FORMAT = "qlora_lightning manifest"
VERSION = 1  # a reader of version N reads every file up to N; keys are only ever added within a version
_REMEDY = "Move it away, and the report goes without it."


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a run folder whole, under its format and version.

    Args:
        folder: The run folder.
        content: Plain values; what is not a number (NaN, infinite) becomes null, which JSON knows.

    Raises:
        OSError: The disk is full or fails.
    """
    head = {"format": FORMAT, "format_version": VERSION}
    text = json.dumps(_finite({**head, **content}), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / NAME, text + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a run folder; ``None`` where there is none, as in runs of earlier versions.

    Raises:
        UserError: It is damaged, of another kind, or a newer version wrote it.
    """
    content = read_json(folder / NAME)
    if content is None:
        return None
    if content.get("format") != FORMAT:
        raise UserError(f"{folder / NAME} is not a manifest of ours: expected format {FORMAT!r} in it.")
    version = content.get("format_version")
    if not isinstance(version, int) or version > VERSION:
        raise UserError(
            f"{folder / NAME} has format_version {version}, and this version reads up to {VERSION}: update "
            "qlora_lightning."
        )
    return content


def read_json(file: Path) -> dict[str, Any] | None:
    """Read a JSON object of a run folder; ``None`` if there is no such file.

    Raises:
        UserError: It is no JSON object, or cut off.
    """
    return read_json_object(file, _REMEDY) if file.exists() else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
