"""Rows to show, token by token: which ones, and their samples cut into pieces that can be read."""

import argparse
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

REASONING, CALL = "reasoning", "tool call"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_LONGEST_GROUP = 16
# <think>, [THINK], <seed:think>, …, and the calls of ChatML; what is not closed goes to the end of its turn
_NAMES = r"[\w:]*(?:think|reason)\w*|tool_call"
_MARK = re.compile(rf"\s*[<\[]/?(?:{_NAMES})[>\]]\s*", re.IGNORECASE)
_MARKED = re.compile(rf"([<\[])({_NAMES})[>\]].*?(?:\1/\2[>\]]|\Z)", re.IGNORECASE | re.DOTALL)
_FIRST, _FOUND = 2, 3  # rows shown if none are asked for, and of those that a search finds
_CHUNK = 1_000
_DECODING = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


class Piece(NamedTuple):
    """One token, or the few that make up a character together.

    Attributes:
        text: Its text.
        ids: Token ids.
        labelled: Whether the loss counts it.
        special: Whether it structures the text, rather than being text.
        stop: Whether it is labelled and ends generation.
        part: ``reasoning`` or ``tool call`` if it is between the marks of one, these included; else nothing.
    """

    text: str
    ids: tuple[int, ...]
    labelled: bool
    special: bool
    stop: bool
    part: str = ""


@dataclass(frozen=True)
class ShownRow:
    """A row to show, or a sentence about one that gave no sample.

    Attributes:
        where: File and line.
        why: What it was chosen for.
        pieces: Pieces of its sample, in order.
        tokens: Tokens of its sample.
        labelled: Labelled tokens among these.
        weight: Its weight.
        note: What became of it, if it gave no sample.
    """

    where: str
    why: str = ""
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    labelled: int = 0
    weight: float = 1.0
    note: str = ""


class PieceCutter:
    """Cuts samples into pieces.

    Args:
        tokenizer: Tokenizer of transformers.
        stop_ids: Token ids at which generation stops.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = added | set(tokenizer.all_special_ids) | self.stop_ids

    def cut(self, ids: Sequence[int], labelled: Sequence[bool]) -> list[Piece]:
        """Cut a sample into pieces, whose texts joined are the decoded sample; ``labelled`` is aligned with ``ids``."""
        pieces: list[Piece] = []
        start = before = 0
        while start < len(ids):
            end, text = self._grow(ids, labelled, start, before)
            special = ids[start] in self.special_ids
            stop = bool(labelled[start]) and ids[start] in self.stop_ids
            pieces.append(Piece(text, tuple(ids[start:end]), bool(labelled[start]), special, stop))
            before, start = start, end
        return _find_parts(pieces)

    def _grow(self, ids: Sequence[int], labelled: Sequence[bool], start: int, before: int) -> tuple[int, str]:
        """Take tokens from ``start`` on until they are whole characters."""
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
        return str(self.tokenizer.decode(list(ids), **_DECODING)) if ids else ""


def _find_parts(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with the part that each is of, turn by turn: control tokens part the turns."""

    def is_text(piece: Piece) -> bool:
        return not piece.special or _MARK.fullmatch(piece.text) is not None

    found: list[Piece] = []
    for is_turn, group in itertools.groupby(pieces, is_text):
        turn = list(group)
        marked = list(_MARKED.finditer("".join(piece.text for piece in turn))) if is_turn else []
        at = 0
        for piece in turn:
            at += len(piece.text)  # a token may reach over a mark: its last character decides
            match = next((one for one in marked if one.start() < at <= one.end()), None)
            part = "" if match is None else CALL if match[2].lower() == "tool_call" else REASONING
            found.append(piece._replace(part=part))
    return found


def choose_rows(
    split: str, samples: SampleSet, report: Report, cutter: PieceCutter, options: argparse.Namespace
) -> list[ShownRow]:
    """Choose rows of a split, in the order of the options; the first two if none are asked for."""

    def show(number: int, why: str = "") -> ShownRow:
        begin, end = (int(at) for at in samples.starts[number : number + 2])
        labelled = samples.labelled[begin:end].tolist()
        pieces = cutter.cut(samples.ids[begin:end].tolist(), labelled)
        weight = 1.0 if samples.weights is None else float(samples.weights[number])
        return ShownRow(samples.where(number), why, tuple(pieces), end - begin, sum(labelled), weight)

    chosen = []
    for place in options.row:
        numbers, bad = _find(split, samples, report, place)
        chosen += [show(number) for number in numbers] + bad
    lengths = samples.lengths
    if options.longest and len(lengths):
        chosen.append(show(int(lengths.argmax()), "the longest"))
    if options.shortest and len(lengths):
        chosen.append(show(int(lengths.argmin()), "the shortest"))
    if options.search is not None:
        found = _search(samples, cutter.tokenizer, options.search)
        more = f"; the first {_FOUND} are shown" if len(found) > _FOUND else ""
        note = f"{len(found):,} of {len(samples):,} samples hold it{more}."
        chosen.append(ShownRow(f"search for {options.search!r}", note=note))
        chosen += [show(number, f"holds {options.search!r}") for number in found[:_FOUND]]
    if options.row or options.longest or options.shortest or options.search is not None:
        return chosen
    return [show(number) for number in range(min(_FIRST, len(lengths)))]


def _find(split: str, samples: SampleSet, report: Report, place: str) -> tuple[list[int], list[ShownRow]]:
    """Return the samples of a line, in any file if none is named, and what became of a row that gave none."""
    file, _, line = place.rpartition(":")
    if not line.isdecimal() or int(line) < 1:
        raise UserError(f"--row {place}: expected a line number from 1, or FILE:LINE as messages name a row.")
    end = f"{file}:{line}"
    of_line = np.flatnonzero(samples.line == int(line)).tolist()
    numbers = [number for number in of_line if samples.where(number).endswith(end)]
    bad = [ShownRow(row.where, note=f"a bad row: {row.reason}") for row in report.bad if row.where.endswith(end)]
    if numbers or bad:
        return numbers, bad
    last = max([report.rows, *samples.line.tolist()])
    if int(line) > last or not any(name.endswith(file) for name in samples.files):
        raise UserError(f"--row {place}: {split} has no such row; its {report.rows:,} rows end at {last}.")
    note = "no sample comes from here: no row begins in that line, or it is bad, dropped or in another split."
    return [], [ShownRow(place if file else f"{split} line {line}", note=note)]


def _search(samples: SampleSet, tokenizer: Any, text: str) -> list[int]:
    found = []
    for begin in range(0, len(samples), _CHUNK):
        bounds = samples.starts[begin : begin + _CHUNK + 1].tolist()
        rows = [samples.ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
        decoded = tokenizer.batch_decode(rows, **_DECODING)
        found += [begin + number for number, row in enumerate(decoded) if text.casefold() in row.casefold()]
    return found
