"""The tokens at which generation stops."""

import json
from pathlib import Path
from typing import Any


def find_stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokenizer's end-of-sequence id, and those of a ``generation_config.json`` in its folder.

    The two often disagree (Llama 3.1 ends a turn with another token than a text), and generation stops at either.
    """
    ids = {tokenizer.eos_token_id}
    config = Path(str(getattr(tokenizer, "name_or_path", ""))) / "generation_config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        ids.update(found if isinstance(found, list) else [found])
    return frozenset(number for number in ids if number is not None)
