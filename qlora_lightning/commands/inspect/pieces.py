"""A sample as the pieces of text that its tokens stand for."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_LONGEST_GROUP = 16


class Piece(NamedTuple):
    """One token, or the few that make up a character together.

    Attributes:
        text: what it says, as it stands in the row.
        ids: token ids.
        labelled: whether the loss counts it.
        special: whether it structures the text, rather than being text.
        stop: whether it is labelled and ends generation.
    """

    text: str
    ids: tuple[int, ...]
    labelled: bool
    special: bool
    stop: bool


class PieceCutter:
    """Cuts samples into pieces.

    Args:
        tokenizer: of transformers.
        stop_ids: token ids at which generation stops.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = added | set(tokenizer.all_special_ids) | self.stop_ids

    def cut(self, ids: Sequence[int], labelled: Sequence[bool]) -> list[Piece]:
        """Cut a sample into pieces; texts joined are the decoded sample.

        Args:
            ids: token ids.
            labelled: aligned with ``ids``.
        """
        pieces: list[Piece] = []
        start = before = 0
        while start < len(ids):
            end, text = self._grow(ids, labelled, start, before)
            special = ids[start] in self.special_ids
            stop = bool(labelled[start]) and ids[start] in self.stop_ids
            pieces.append(Piece(text, tuple(ids[start:end]), bool(labelled[start]), special, stop))
            before, start = start, end
        return pieces

    def _grow(self, ids: Sequence[int], labelled: Sequence[bool], start: int, before: int) -> tuple[int, str]:
        """Take tokens from ``start`` on until they say whole characters."""
        # Decoded behind the piece before it, a token keeps the space that some decoders drop at the start of a text.
        context = self._decode(ids[before:start])
        end = start + 1
        while True:
            text = self._decode(ids[before:end])
            text = text[len(context) :] if text.startswith(context) else self._decode(ids[start:end])
            alone = (
                end == len(ids)
                or end - start == _LONGEST_GROUP
                or labelled[end] != labelled[start]
                or ids[end] in self.special_ids
            )
            if alone or not text.endswith(_UNFINISHED):
                return end, text
            end += 1

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
