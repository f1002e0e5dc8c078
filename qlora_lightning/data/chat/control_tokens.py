"""The tokens of a tokenizer that begin, end or structure text rather than being text."""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple


class Control(NamedTuple):
    """A control token in a text: its id, its first character, and the character behind it."""

    id: int
    start: int
    end: int


class ControlTokens:
    """Finds control tokens in texts and in ids; a tokenizer splits a text at them before anything else.

    Args:
        tokenizer: a tokenizer of transformers.
        stop_ids: ids at which generation stops; they count as control tokens whatever the tokenizer says of them.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        self.ids = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids.update({tokenizer.decode([number]): number for number in stop_ids})
        self._known = frozenset(self.ids.values())
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def search(self, text: str) -> str | None:
        """Return the first control token in a text."""
        found = self._pattern.search(text)
        return found[0] if found else None

    def in_text(self, text: str) -> list[Control]:
        """Return every control token of a text."""
        return [Control(self.ids[found[0]], *found.span()) for found in self._pattern.finditer(text)]

    def in_ids(self, ids: Sequence[int]) -> list[int]:
        """Return where control tokens stand among ids."""
        known = self._known
        return [at for at, number in enumerate(ids) if number in known]


def writes_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before a text by itself."""
    ids = tokenizer.encode("a", add_special_tokens=True) if hasattr(tokenizer, "backend_tokenizer") else []
    return bool(ids) and ids[0] == tokenizer.bos_token_id
