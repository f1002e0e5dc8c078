"""The control tokens of a tokenizer, and those at which generation stops."""

import re
import reprlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from qlora_lightning.data.rows.conversation import Message
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import read_json_object


class ControlTokens:
    """The control tokens of a tokenizer, which splits a text at them before anything else.

    Ids at which generation stops count as control tokens, special or not. ``ids`` has every control token with its id,
    ``pattern`` finds any of them in a text, ``stop_pattern`` those at which generation stops.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        stops = {tokenizer.decode([token_id]): token_id for token_id in stop_ids}
        self.ids = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids.update(stops)
        self.known = frozenset(self.ids.values())
        self.pattern = _any_of(self.ids)
        self.stop_pattern = _any_of(stops)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def writes_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before a text by itself."""
    ids = tokenizer.encode("a", add_special_tokens=True) if hasattr(tokenizer, "backend_tokenizer") else []
    return bool(ids) and ids[0] == tokenizer.bos_token_id


PROBE: tuple[Message, Message] = (
    {"role": "user", "content": "A question."},
    {"role": "assistant", "content": "An answer, to be found again."},
)


def find_stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return every id at which generation with this tokenizer's model stops.

    They are the tokenizer's end-of-sequence id, the former one if a template was chosen, and those of the
    ``generation_config.json`` in its folder, or else of ``config.json``. They often disagree.
    """
    ids = {tokenizer.eos_token_id, *getattr(tokenizer, "former_stop_ids", ())}
    name = str(getattr(tokenizer, "name_or_path", ""))
    files = [Path(name) / file for file in ("generation_config.json", "config.json")] if name else []
    config = next((file for file in files if file.is_file()), None)
    if config is not None:
        remedy, keys = "It names the stop tokens: correct or delete it.", {"eos_token_id": int | list[int] | None}
        eos_ids = read_json_object(config, remedy, keys).get("eos_token_id")
        eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
        if any(token_id is not None and not 0 <= token_id < 1 << 31 for token_id in eos_ids):
            raise UserError(f"{config}: eos_token_id is {reprlib.repr(eos_ids)}, expected token ids. {remedy}")
        ids.update(eos_ids)
    return frozenset(token_id for token_id in ids if token_id is not None)


def find_turn_end(tokenizer: Any) -> int | None:
    """Return the id of the first control token that the chat template writes after an answer; None if it writes none.

    Errors of the template pass through; a UserError if it changes the answer.
    """
    text = tokenizer.apply_chat_template(list(PROBE), tokenize=False, add_generation_prompt=False)
    _, answer, tail = str(text).rpartition(PROBE[1]["content"])
    if not answer:
        raise UserError(
            f"the chat template does not write the content of an assistant message: it renders one as {text!r}."
        )
    controls = ControlTokens(tokenizer, ())
    control = controls.pattern.search(tail)
    return controls.ids[control[0]] if control else None
