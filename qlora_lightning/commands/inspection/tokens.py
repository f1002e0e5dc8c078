"""Rows to show, token by token: which ones, and their samples as text with what is trained."""

import argparse
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from qlora_lightning.data.chat.tokenizer import ControlTokens
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.console import show_controls
from qlora_lightning.support.errors import UserError

MARKS = Text("⟦labelled tokens⟧ · ■ stop token · │ between tokens · ↵ newline")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_MOST_TOKENS = 16  # of a character
_FIRST = 2  # rows shown if none are asked for


def show_rows(
    samples: SampleSet, tokenizer: Any, stop_ids: Collection[int], options: argparse.Namespace
) -> Iterator[tuple[Text, Text]]:
    """Yield a heading and the tokens of each row that the options name; of the first two if they name none.

    Raises:
        UserError: ``--row`` names no row.
    """
    numbers: list[int] = []
    for place in options.row:
        file, _, line = place.rpartition(":")
        of_line = np.flatnonzero(samples.line == int(line)).tolist() if line.isdecimal() else []
        found = [number for number in of_line if samples.where(number).endswith(f"{file}:{line}")]
        if not found:
            raise UserError(f"--row {place}: no sample begins there. Expected a line number, or FILE:LINE.")
        numbers += found
    if options.longest:
        numbers.append(int(samples.lengths.argmax()))
    for number in numbers or range(min(_FIRST, len(samples))):
        span = slice(*samples.starts[number : number + 2])
        ids, labelled = samples.ids[span].tolist(), samples.labelled[span].tolist()
        about = f"  {len(ids):,} tokens, {sum(labelled):,} labelled"
        yield Text.assemble((samples.where(number), "bold"), about), _mark_tokens(ids, labelled, tokenizer, stop_ids)


def _mark_tokens(ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any, stop_ids: Collection[int]) -> Text:
    """Return a sample as text: a mark between tokens, labelled ones in brackets, control tokens in colours."""
    special_ids, text = ControlTokens(tokenizer, stop_ids).known, Text()
    is_labelled = False
    for piece, number in _cut(ids, labelled, tokenizer):
        mark = "│" if number else ""
        if labelled[number] != is_labelled:
            is_labelled = labelled[number]
            mark = "⟦" if is_labelled else "⟧"
        colour = "green" if is_labelled else ""
        if ids[number] in special_ids:
            colour = "bold magenta" if is_labelled else "magenta"
        text.append(mark, "dim").append(show_controls(piece).replace("\n", "↵\n"), colour)
        text.append("■" if is_labelled and ids[number] in stop_ids else "")
    text.append("⟧" if is_labelled else "")
    text.rstrip()
    return text


def _cut(ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Yield the text of each token, or of the few that make up a character together, and the number of the first."""
    before = start = 0
    while start < len(ids):
        # decoded behind the piece before it, a token keeps the space that some decoders drop at the start of a text
        context = tokenizer.decode(list(ids[before:start])) if start else ""
        for end in range(start + 1, len(ids) + 1):
            text = tokenizer.decode(list(ids[before:end])).removeprefix(context)
            is_whole = not text.endswith(_UNFINISHED) or end in (len(ids), start + _MOST_TOKENS)
            if is_whole or labelled[end] != labelled[start]:
                break
        yield text, start
        before, start = start, end
