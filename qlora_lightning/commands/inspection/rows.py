"""Rows to show, token by token: which ones, and their samples cut into pieces that can be read."""

import argparse
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.data.chat.tokenizer import ControlTokens
from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

REASONING, TOOL_CALL = "reasoning", "tool call"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_MOST_TOKENS = 16  # of a piece
# <think>, [THINK], <seed:think>, …, and the calls of ChatML; what is not closed ends with its turn
_NAMES = r"[\w:]*(?:think|reason)\w*|tool_call"
_MARK = re.compile(rf"\s*[<\[]/?(?:{_NAMES})[>\]]\s*", re.IGNORECASE)
_MARKED = re.compile(rf"([<\[])({_NAMES})[>\]].*?(?:\1/\2[>\]]|\Z)", re.IGNORECASE | re.DOTALL)
_FIRST, _FOUND = 2, 3  # rows shown if none are asked for, and of those that a search finds
_DECODING = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


class Piece(NamedTuple):
    """One token, or the few that make up a character together.

    Attributes:
        text: Its text.
        ids: Token ids.
        labelled: Whether the loss counts it.
        special: Whether it is a control token.
        stop: Whether it is labelled and ends generation.
        part: ``reasoning`` or ``tool call`` if it is between the marks of one, these included; else nothing.
    """

    text: str
    ids: tuple[int, ...]
    labelled: bool
    special: bool
    stop: bool
    part: str = ""


class ShownRow(NamedTuple):
    """A row to show: where it is, what is said about it, and the pieces of its sample if it has one."""

    where: str
    about: str
    pieces: Sequence[Piece] = ()


def choose_rows(
    split: str,
    samples: SampleSet,
    report: Report,
    tokenizer: Any,
    stop_ids: Collection[int],
    options: argparse.Namespace,
) -> Iterator[ShownRow]:
    """Yield rows of a split, in the order of the options; the first two if none are asked for.

    Raises:
        UserError: ``--row`` is not a line number.
    """

    def show(number: int, why: str = "") -> ShownRow:
        span = slice(*samples.starts[number : number + 2])
        ids, labelled = samples.ids[span].tolist(), samples.labelled[span].tolist()
        about = [f"{len(ids):,} tokens", f"{sum(labelled):,} labelled"]
        pieces = cut_into_pieces(ids, labelled, tokenizer, stop_ids)
        return ShownRow(samples.where(number), ", ".join([*about, why] if why else about), pieces)

    for place in options.row:
        file, _, line = place.rpartition(":")
        if not line.isdecimal():
            raise UserError(f"--row {place}: expected a line number, or FILE:LINE as messages name a row.")
        end = f"{file}:{line}"
        of_line = np.flatnonzero(samples.line == int(line)).tolist()
        here = [number for number in of_line if samples.where(number).endswith(end)]
        bad = [row for row in report.bad if row.where.endswith(end)]
        yield from map(show, here)
        yield from (ShownRow(row.where, f"bad row: {row.reason}") for row in bad)
        if not here and not bad:
            yield ShownRow(f"{split} {place}", "no row begins in this line, or it was dropped or is in another split")
    if options.longest:
        yield show(int(samples.lengths.argmax()), "the longest")
    if options.shortest:
        yield show(int(samples.lengths.argmin()), "the shortest")
    if options.search is not None:
        wanted = options.search.casefold()
        rows = (samples.ids[start:end].tolist() for start, end in itertools.pairwise(samples.starts.tolist()))
        found = [n for n, ids in enumerate(rows) if wanted in tokenizer.decode(ids, **_DECODING).casefold()]
        yield ShownRow(f"search for {options.search!r}", f"found in {len(found):,} of {len(samples):,} samples")
        yield from map(show, found[:_FOUND])
    if not (options.row or options.longest or options.shortest or options.search is not None):
        yield from map(show, range(min(_FIRST, len(samples))))


# ---- pieces ----------------------------------------------------------------------------------------------------------


def cut_into_pieces(
    ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any, stop_ids: Collection[int]
) -> list[Piece]:
    """Cut a sample into pieces, whose texts joined are the decoded sample.

    Args:
        ids: Token ids.
        labelled: Whether the loss counts each, aligned with ``ids``.
        tokenizer: Of transformers.
        stop_ids: Token ids at which generation stops.
    """

    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), **_DECODING)) if start < end else ""

    special_ids = ControlTokens(tokenizer, stop_ids).known
    pieces: list[Piece] = []
    before = start = 0
    while start < len(ids):
        # Decoded behind the piece before it, a token keeps the space that some decoders drop at the start of a text.
        context = decode(before, start)
        for end in range(start + 1, len(ids) + 1):
            text = decode(before, end)
            text = text.removeprefix(context) if text.startswith(context) else decode(start, end)
            if (
                not text.endswith(_UNFINISHED)
                or end in (len(ids), start + _MOST_TOKENS)
                or labelled[end] != labelled[start]
                or ids[end] in special_ids
            ):
                break
        stop = labelled[start] and ids[start] in stop_ids
        pieces.append(Piece(text, tuple(ids[start:end]), labelled[start], ids[start] in special_ids, stop))
        before, start = start, end
    return list(_name_parts(pieces))


def _name_parts(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield the pieces with the part that each is of, turn by turn: control tokens divide the turns."""

    def is_text(piece: Piece) -> bool:
        return not piece.special or _MARK.fullmatch(piece.text) is not None

    for is_turn, group in itertools.groupby(pieces, is_text):
        turn = list(group)
        marked = list(_MARKED.finditer("".join(piece.text for piece in turn))) if is_turn else []
        end = 0
        for piece in turn:
            end += len(piece.text)  # a token may reach over a mark: its last character decides
            names = [match[2].lower() for match in marked if match.start() < end <= match.end()]
            yield piece._replace(part=(TOOL_CALL if names == ["tool_call"] else REASONING) if names else "")
