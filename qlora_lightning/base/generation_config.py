"""``generation_config.json``: where generation stops."""

from pathlib import Path
from typing import Any

from qlora_lightning.json_file import read_json_object

_TOKENS = {"eos_token_id": (int, [int]), "bos_token_id": (int, [int]), "pad_token_id": int}


def read_generation_config(file: Path) -> dict[str, Any]:
    """Read a ``generation_config.json``, or the same keys of a ``config.json``.

    Raises:
        UserError: It is not a JSON object, or the tokens in it are none.
    """
    return read_json_object(file, "The stop tokens stand there: mend or delete it.", _TOKENS)
