"""Whether an adapter is asked as it was asked in training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich
from rich.markup import escape

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.model.adapters.identity import data_differences

_SETTINGS = {  # what makes prompts, and the settings that it comes from
    "tokenizer": "data.tokenizer",
    "chat_template": "data.chat_template and data.template_options",
    "system": "data.system",
}


def warn_of_other_prompts(name: str, folder: Path, own: Mapping[str, Any]) -> None:
    """Say in a sentence when prompts are rendered otherwise than in an adapter's training.

    Args:
        name: Of the adapter.
        folder: Its own.
        own: What the data module says of its rows, tokenizer and template.
    """
    stored = read_identity(folder).get("data") or {}
    differs = {
        key: words.partition(" (")[0] for key, words in data_differences(stored, own).items() if key in _SETTINGS
    }
    trained, asked = ((each.get("settings") or {}).get("system") for each in (stored, own))
    if "settings" in stored and trained != asked:
        there, here = ("none" if text is None else repr(text) for text in (trained, asked))
        differs["system"] = f"system prompt ({there} there, {here} here)"
    if differs:
        what, keys = " and another ".join(differs.values()), " and ".join(_SETTINGS[key] for key in differs)
        rich.print(
            f"[yellow]Warning:[/yellow] {escape(name)} was trained with another {escape(what)}, so it is judged on "
            f"prompts that it does not know: set {keys} as in its training."
        )
