"""What our part of a checkpoint holds, and what is checked before it is used."""

from collections.abc import Mapping
from typing import Any

from qlora_lightning.errors import UserError

KEY = "qlora_lightning"  # our settings lie under our own key: under Lightning's they would beat the command line
FORMAT_VERSION = 1


def read_content(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Give our part of a checkpoint.

    Raises:
        UserError: The checkpoint is foreign or newer than this version can read.
    """
    content = checkpoint.get(KEY)
    if not isinstance(content, dict) or "format_version" not in content:
        raise UserError(f"{source} was not written by qlora_lightning: expected the key {KEY!r} in it.")
    version = content["format_version"]
    if version > FORMAT_VERSION:
        raise UserError(
            f"{source} has format version {version}, and this version of qlora_lightning reads up to {FORMAT_VERSION}: "
            "update qlora_lightning."
        )
    return content


def check_identity(stored: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter that was trained on another base: it would load without a word and answer nonsense.

    Raises:
        UserError: Fingerprint or quantization differ.
    """
    for name in ("fingerprint", "quantization"):
        if stored.get(name) and own.get(name) and stored[name] != own[name]:
            raise UserError(
                f"{source} was trained on another base: its {name} is {stored[name]} (base {stored.get('base')}), "
                f"this model's is {own[name]} (base {own.get('base')}). Set model.base and model.quantization to those "
                "that it was trained on."
            )
