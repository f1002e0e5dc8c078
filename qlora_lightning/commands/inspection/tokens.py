"""Rows to show, token by token: which ones, and their samples as text with what is trained."""

import argparse
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from qlora_lightning.data.chat.tokenizer import ControlTokens
from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.console import show_controls
from qlora_lightning.support.errors import UserError

MARKS = Text("⟦labelled tokens⟧ · ■ stop token · │ between tokens · ↵ newline · ").append("reasoning, calls", "cyan")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_MOST_TOKENS = 16  # of a character
# <think>, [THINK], <seed:think>, …, and the calls of ChatML; what is not closed ends with its turn
_PART = re.compile(r"([<\[])([\w:]*(?:think|reason)\w*|tool_call)[>\]].*?(?:\1/\2[>\]]|<\||\Z)", re.I | re.S)
_FIRST = 2  # rows shown if none are asked for
_DECODING = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def show_rows(
    split: str,
    samples: SampleSet,
    report: Report,
    tokenizer: Any,
    stop_ids: Collection[int],
    options: argparse.Namespace,
) -> Iterator[tuple[Text, Text]]:
    """Yield a heading and the tokens of each row that the options name; of the first two if they name none.

    Raises:
        UserError: ``--row`` is not a line number.
    """

    def show(number: int, why: str = "") -> tuple[Text, Text]:
        span = slice(*samples.starts[number : number + 2])
        ids, labelled = samples.ids[span].tolist(), samples.labelled[span].tolist()
        about = f"{len(ids):,} tokens, {sum(labelled):,} labelled{why}"
        return _heading(samples.where(number), about), mark_tokens(ids, labelled, tokenizer, stop_ids)

    for place in options.row:
        file, _, line = place.rpartition(":")
        if not line.isdecimal():
            raise UserError(f"--row {place}: expected a line number, or FILE:LINE as messages name a row.")
        end = f"{file}:{line}"
        of_line = np.flatnonzero(samples.line == int(line)).tolist()
        found = [show(number) for number in of_line if samples.where(number).endswith(end)]
        listed = ((place, reason) for reason, places in report.bad.items() for place in places)
        bad = [(place, f"bad row: {reason}") for place, reason in listed if place.endswith(end)]
        if not found and not bad:
            bad = [(f"{split} {place}", "no row begins in this line, or it was dropped or is in another split")]
        yield from [*found, *((_heading(*words), Text()) for words in bad)]
    if options.longest:
        yield show(int(samples.lengths.argmax()), ", the longest")
    if not (options.row or options.longest):
        yield from map(show, range(min(_FIRST, len(samples))))


def _heading(where: str, about: str) -> Text:
    return Text.assemble((where, "bold"), f"  {about}")


def mark_tokens(ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any, stop_ids: Collection[int]) -> Text:
    """Return a sample as text: a mark between tokens, labelled ones in brackets, control tokens and parts in colours.

    Args:
        ids: Token ids.
        labelled: Whether the loss counts each, aligned with ``ids``.
        tokenizer: Of transformers.
        stop_ids: Token ids at which generation stops.
    """
    special_ids, text = ControlTokens(tokenizer, stop_ids).known, Text()
    pieces = list(_cut(ids, labelled, tokenizer, special_ids))
    parts = [match.span() for match in _PART.finditer("".join(piece for piece, _ in pieces))]
    is_labelled, end = False, 0
    for piece, number in pieces:
        end += len(piece)
        mark = "│" if number else ""
        if labelled[number] != is_labelled:
            is_labelled = labelled[number]
            mark = "⟦" if is_labelled else "⟧"
        colour = "green" if is_labelled else ""
        if ids[number] in special_ids:
            colour = "bold magenta" if is_labelled else "magenta"
        elif any(first < end <= last for first, last in parts):
            colour = "cyan"
        text.append(mark, "dim").append(show_controls(piece).replace("\n", "↵\n"), colour)
        text.append("■" if is_labelled and ids[number] in stop_ids else "")
    text.append("⟧" if is_labelled else "")
    text.rstrip()
    return text


def _cut(
    ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any, special_ids: Collection[int]
) -> Iterator[tuple[str, int]]:
    """Yield the text of each token, or of the few that make up a character together, and the number of the first."""

    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), **_DECODING)) if start < end else ""

    before = start = 0
    while start < len(ids):
        # decoded behind the piece before it, a token keeps the space that some decoders drop at the start of a text
        context = decode(before, start)
        for end in range(start + 1, len(ids) + 1):
            text = decode(before, end)
            text = text.removeprefix(context) if text.startswith(context) else decode(start, end)
            is_whole = not text.endswith(_UNFINISHED) or end in (len(ids), start + _MOST_TOKENS)
            if is_whole or labelled[end] != labelled[start] or ids[end] in special_ids:
                break
        yield text, start
        before, start = start, end
