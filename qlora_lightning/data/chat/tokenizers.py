"""The tokenizer of a data module: what it is named by, what it consists of, and loading it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_lightning.data.chat.templates import PRESETS, choose_chat_template
from qlora_lightning.support.errors import UserError

TokenizerChoice = str | dict[str, Any] | Any | None
_KEYS = ("name", "revision", "trust_remote_code")


def tokenizer_of_base(base: str, revision: str | None = None, trust_remote_code: bool = False) -> str | dict[str, Any]:
    """Return the choice that is the base's own tokenizer, of the same revision."""
    if revision is None and not trust_remote_code:
        return base
    return {"name": base, "revision": revision, "trust_remote_code": trust_remote_code}


def load_choice(
    choice: TokenizerChoice, chat_template: str | None, template_options: Mapping[str, Any] | None = None
) -> Any:
    """Load a tokenizer, and put the chosen chat template on a copy.

    Args:
        choice: hub id, folder or ``package:NAME``; ``{name, revision, trust_remote_code}``; or a tokenizer object.
        chat_template: as in ``choose_chat_template``.
        template_options: its ``options``.

    Raises:
        UserError: there is no such tokenizer or template.
    """
    if isinstance(choice, str | dict):
        from qlora_lightning.base.folder import load_tokenizer

        tokenizer: Any = load_tokenizer(**_as_arguments(choice))
    elif choice is None:
        raise UserError("tokenizer: expected a hub id, a folder or package:NAME, found none (the base's, usually).")
    else:
        tokenizer = choice
    return choose_chat_template(tokenizer, chat_template, template_options)


def hash_choice(choice: TokenizerChoice, chat_template: str | None) -> str | None:
    """Hash all that the chosen tokenizer and template consist of, without loading them; None where that is unknown."""
    if choice is None:
        return None
    if isinstance(choice, str | dict):
        hashed: str | None = hash_tokenizer_files(_find_folder(**_as_arguments(choice)))
    else:
        hashed = hash_tokenizer(choice)
    if hashed is None or chat_template is None or chat_template in PRESETS:
        return hashed and f"{hashed} {chat_template}"
    file = Path(chat_template).expanduser()
    return f"{hashed} {file.read_text(encoding='utf-8', errors='replace')}" if file.is_file() else None


def hash_tokenizer_files(folder: Path) -> str:
    """Hash the files that a tokenizer and its stop tokens are read from, without loading it."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors" not in file.name:
            total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def hash_tokenizer(tokenizer: Any, with_template: bool = True) -> str | None:
    """Hash a loaded tokenizer, its template included; None where it cannot be told what it consists of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts = [backend.to_str(), tokenizer.chat_template if with_template else None, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _as_arguments(choice: str | dict[str, Any]) -> dict[str, Any]:
    arguments = {"name": choice} if isinstance(choice, str) else dict(choice)
    if "name" not in arguments or arguments.keys() - set(_KEYS):
        raise UserError(f"tokenizer: expected a name, or a mapping with {', '.join(_KEYS)}, found {choice!r}.")
    return arguments


def _find_folder(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    from qlora_lightning.base.folder import open_base

    folder = Path(name).expanduser()
    return folder if revision is None and folder.is_dir() else open_base(name, revision, weights=False).folder
