"""The tokenizer that data are rendered with, where it lies on this machine."""

from pathlib import Path
from typing import Any

from qlora_lightning.base.find import is_hub_id, resolve_base
from qlora_lightning.base.gguf import find_unpacked
from qlora_lightning.commands.plan.base_config import find_in_hub_cache
from qlora_lightning.support.errors import UserError

_SMALL = 1_000_000_000  # bytes of a GGUF that is unpacked here, which `fit` would do too, for the tokenizer inside


def find_tokenizer(choice: Any) -> tuple[Any, str | None]:
    """Turn ``data.tokenizer`` into a choice that fetches nothing, or say why there is none.

    Args:
        choice: As the config has it.

    Returns:
        The choice, and a sentence where it cannot be used.
    """
    settings = choice if isinstance(choice, dict) else {"name": choice}
    name, revision = settings.get("name"), settings.get("revision")
    if not isinstance(name, str):
        return choice, None
    if is_hub_id(name):
        file = find_in_hub_cache(name, "tokenizer.json", revision)
        if file is None:
            return choice, f"The tokenizer of {name} is not in the hub's local cache, and plan fetches nothing."
        return {**settings, "name": str(file.parent), "revision": None}, None
    if Path(name).expanduser().is_dir():
        return choice, None
    try:
        source = resolve_base(name, revision)
    except UserError as error:
        return choice, str(error)
    if find_unpacked(source) is None and source.path.stat().st_size > _SMALL:
        return choice, f"The tokenizer lies inside {source.path.name}, which `fit` unpacks first."
    return choice, None
