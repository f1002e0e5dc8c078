"""``generation_config.json``: where generation stops."""

import json
from pathlib import Path
from typing import Any

from qlora_lightning.errors import UserError
from qlora_lightning.json_shape import find_fault

_TOKENS = {"eos_token_id": (int, [int]), "bos_token_id": (int, [int]), "pad_token_id": int}


def read_generation_config(file: Path) -> dict[str, Any]:
    """Read a ``generation_config.json``, or the same keys of a ``config.json``.

    Raises:
        UserError: It is not a JSON object, or the tokens in it are none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): the stop tokens stand there. Mend or delete it.") from error
    fault = find_fault(content, _TOKENS) if isinstance(content, dict) else "it is no object"
    if fault:
        raise UserError(f"{file} is damaged: {fault}. The stop tokens stand there: mend or delete it.")
    found: dict[str, Any] = content
    return found
