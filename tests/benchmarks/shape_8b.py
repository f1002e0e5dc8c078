"""The shape of Llama-3.1-8B, and whether a folder holds a base of it."""

import json
import re
from pathlib import Path

from transformers import LlamaConfig

from qlora_lightning.support.errors import UserError

# all but config.json, which comes last
_MADE_FILES = r"model-\d{5}\.safetensors|model\.safetensors\.index\.json|tokenizer.*|chat_template\.jinja"
_SHAPE = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads"),
)


def make_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        dtype="bfloat16",
        bos_token_id=0,  # those of the tokenizer of tests/random_base.py
        eos_token_id=1,
        pad_token_id=1,
    )


def check_folder(folder: Path, layers: int) -> None:
    """Refuse a folder in which the base can neither be made nor is.

    Raises:
        UserError: it is a file, holds another base, or files that are no base's.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--llama-8b {folder}: expected a folder, found a file; name a folder that may hold 16 GB.")
    if not (folder / "config.json").exists():
        others = sorted(file.name for file in folder.iterdir() if not re.fullmatch(_MADE_FILES, file.name))
        if others:
            raise UserError(
                f"--llama-8b {folder}: expected a base made here or an empty folder, found {others[0]}; name another."
            )
        return
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--llama-8b {folder}: its config.json cannot be read ({error}); name another.") from error
    wanted = {name: getattr(make_config(layers), name) for name in _SHAPE}
    differs = [name for name in _SHAPE if not isinstance(found, dict) or found.get(name) != wanted[name]]
    if differs:
        shown = found.get(differs[0]) if isinstance(found, dict) else found
        remedy = "give that as --llama-8b-layers, or " if differs == ["num_hidden_layers"] else ""
        raise UserError(
            f"--llama-8b {folder} holds another base: expected {differs[0]} {wanted[differs[0]]}, found {shown}; "
            f"{remedy}name another folder."
        )
