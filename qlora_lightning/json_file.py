"""JSON objects in files that users may have cut off, edited or mixed up."""

import json
from pathlib import Path
from typing import Any

from qlora_lightning.errors import UserError
from qlora_lightning.json_shape import Shape, find_fault


def read_json_object(file: Path, remedy: str, shape: Shape = None) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        file: To read, in UTF-8.
        remedy: A sentence that ends the refusals: what to do with a file that is wrong.
        shape: What the object must look like.

    Raises:
        UserError: It cannot be read, is no JSON object, or has another shape.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON, or it is cut off ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}. {remedy}")
    check_shape(file, content, remedy, shape)
    return content


def check_shape(file: Path, content: dict[str, Any], remedy: str, shape: Shape) -> None:
    """Refuse an object that :func:`read_json_object` gave and that has another shape.

    For files of which something must be known first: which version wrote them, of which kind they are.

    Raises:
        UserError: It has another shape.
    """
    fault = find_fault(content, shape)
    if fault:
        raise UserError(f"{file} is damaged: {fault}. {remedy}")
