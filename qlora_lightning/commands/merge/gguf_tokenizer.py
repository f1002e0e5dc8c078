"""A tokenizer as a GGUF file holds it: tokens, their types, merges, special ids and the chat template."""

import json
from pathlib import Path
from typing import Any

import gguf

from qlora_lightning.base.find import resolve_base
from qlora_lightning.base.folder import BaseFolder
from qlora_lightning.support.errors import UserError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, split: str | None) -> None:
    """Write the tokenizer of a folder.

    Args:
        writer: Of the file.
        folder: With ``tokenizer.json`` and ``tokenizer_config.json``.
        vocabulary: Rows of the embedding; those that no token has are told as unused.
        split: llama.cpp's name of how text is split before merging, where the base's own file says it.

    Raises:
        UserError: The tokenizer is of a kind that is not written.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(
            "--gguf writes byte-level BPE tokenizers (Llama 3, SmolLM); this one is of Llama 2's kind. Merge without "
            "--gguf, and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    types = gguf.TokenType
    tokens = {number: (text, types.NORMAL) for text, number in model["vocab"].items()}
    for token in content.get("added_tokens", []):
        tokens[token["id"]] = (token["content"], types.CONTROL if token["special"] else types.USER_DEFINED)
    listed = [tokens.get(number, (f"[PAD{number}]", types.UNUSED)) for number in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split or _name_split(content.get("pre_tokenizer")))
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    if special.chat_template is None and (folder / "chat_template.jinja").is_file():
        special.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    special.add_to_gguf(writer, quiet=True)
    # llama.cpp would begin every prompt with a BOS where the file is silent; templates write their own
    if "bos" not in special.add_special_token:
        writer.add_add_bos_token(False)


def split_of_base(base: BaseFolder) -> str | None:
    """Give llama.cpp's name of how the base's own GGUF file splits text; nothing where it is no GGUF."""
    if base.kind != "gguf":
        return None
    found = gguf.GGUFReader(resolve_base(base.name).path).get_field(gguf.Keys.Tokenizer.PRE)
    return None if found is None else str(found.contents())


def _name_split(pre_tokenizer: dict[str, Any] | None) -> str:
    """Name a pre-tokenizer as llama.cpp does.

    Raises:
        UserError: llama.cpp would split text otherwise than this tokenizer, as far as we know.
    """
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"] and parts[0].get("pattern", {}).get("Regex") == _LLAMA3:
        return "llama-bpe"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    raise UserError(
        "--gguf: how this tokenizer splits text has no name here that llama.cpp knows, and a wrong one would change "
        "prompts without a word. Merge without --gguf, and convert the folder with llama.cpp's convert_hf_to_gguf.py."
    )
