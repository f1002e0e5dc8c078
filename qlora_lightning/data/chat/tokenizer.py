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


def hash_tokenizer(choice: TokenizerChoice, chat_template: str | None = None, with_template: bool = True) -> str | None:
    """Hash all that a tokenizer and its template consist of, without loading it; None if that is unknown.

    Args:
        choice: as in ``load_choice``; of a name the files are hashed that tokenizer and stop tokens are read from.
        chat_template: as in ``load_choice``.
        with_template: whether the template of a tokenizer object counts.
    """
    parts: list[Any] = [chat_template]
    if isinstance(choice, str | dict):
        for file in sorted(_find_folder(**_as_arguments(choice)).iterdir()):
            if file.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors" not in file.name:
                parts.append((file.name, hashlib.sha256(file.read_bytes()).hexdigest()))
    else:
        tokenizer: Any = choice
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        parts += [backend.to_str(), tokenizer.chat_template if with_template else None, tokenizer.special_tokens_map]
    if chat_template is not None and chat_template not in PRESETS:
        file = Path(chat_template).expanduser()
        if not file.is_file():
            return None
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
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
