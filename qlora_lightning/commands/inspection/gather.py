"""Prepares the data and gathers all that is shown: facts, and rows token by token."""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.commands.inspection.arguments import SPLITS, Config, Options
from qlora_lightning.commands.inspection.facts import (
    Ends,
    Epoch,
    SplitFacts,
    count_ends,
    count_sources,
    describe_ends,
    histogram,
    percentiles,
    plan_epoch,
)
from qlora_lightning.data.batches.epoch_plan import EpochPlan
from qlora_lightning.data.report import Report
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.errors import UserError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_LONGEST_GROUP = 16
REASONING, CALL = "reasoning", "tool call"
# <think>, [THINK], <seed:think>, …, and the calls of ChatML; what is not closed goes to the end of its turn
_NAMES = r"[\w:]*(?:think|reason)\w*|tool_call"
_MARK = re.compile(rf"\s*[<\[]/?(?:{_NAMES})[>\]]\s*", re.IGNORECASE)
_MARKED = re.compile(rf"([<\[])({_NAMES})[>\]].*?(?:\1/\2[>\]]|\Z)", re.IGNORECASE | re.DOTALL)


class Piece(NamedTuple):
    """One token, or the few that make up a character together.

    Attributes:
        text: what it says, as it stands in the row.
        ids: token ids.
        labelled: whether the loss counts it.
        special: whether it structures the text, rather than being text.
        stop: whether it is labelled and ends generation.
        part: ``reasoning`` or ``tool call`` if it is between the marks of one, these included; else nothing.
    """

    text: str
    ids: tuple[int, ...]
    labelled: bool
    special: bool
    stop: bool
    part: str = ""


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
        return _find_parts(pieces)

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


_FIRST, _FOUND = 2, 3  # rows shown when none are asked for, and of those that a search finds
_CHUNK = 1_000


def _is_said(piece: Piece) -> bool:
    """Whether a piece is no control token, or one that marks a part."""
    return not piece.special or _MARK.fullmatch(piece.text) is not None


def _find_parts(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with the part that each is of, turn by turn: control tokens part the turns."""
    found: list[Piece] = []
    for is_turn, group in itertools.groupby(pieces, _is_said):
        turn = list(group)
        marked = list(_MARKED.finditer("".join(piece.text for piece in turn))) if is_turn else []
        at = 0
        for piece in turn:
            # a token may reach over a mark: its last character decides
            at += len(piece.text)
            match = next((one for one in marked if one.start() < at <= one.end()), None)
            part = "" if match is None else CALL if match[2].lower() == "tool_call" else REASONING
            found.append(piece._replace(part=part))
    return found


@dataclass(frozen=True)
class ShownRow:
    """A row to show, or a sentence about one that gave no sample.

    Attributes:
        where: file and line.
        why: what it was chosen for.
        pieces: of its sample, in order.
        tokens: of its sample.
        labelled: of these, labelled ones.
        note: what became of it, if it gave no sample.
        weight: of its row.
    """

    where: str
    why: str
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    labelled: int = 0
    note: str = ""
    weight: float = 1.0


class RowChooser:
    """Finds the rows of a split that the options ask for.

    Args:
        split: name of the split.
        samples: its ``SampleSet``.
        report: its ``Report``.
        cutter: cuts samples into pieces.
        others: the samples of the other splits, which may hold a row that is looked for.
    """

    def __init__(
        self,
        split: str,
        samples: SampleSet,
        report: Report,
        cutter: PieceCutter,
        others: Mapping[str, SampleSet] = MappingProxyType({}),
    ) -> None:
        self.split = split
        self.samples = samples
        self.report = report
        self.cutter = cutter
        self.others = others

    def choose(self, options: Options) -> list[ShownRow]:
        """Choose rows, in the order of the options; the first two if none are asked for.

        Raises:
            UserError: the split has no such row.
        """
        chosen = [row for place in options.rows for row in self._at(place)]
        lengths = self.samples.lengths
        if options.longest and len(lengths):
            chosen.append(self._show(int(lengths.argmax()), "the longest"))
        if options.shortest and len(lengths):
            chosen.append(self._show(int(lengths.argmin()), "the shortest"))
        if options.search is not None:
            chosen += self._search(options.search)
        if options.rows or options.longest or options.shortest or options.search is not None:
            return chosen
        return [self._show(number, "") for number in range(min(_FIRST, len(lengths)))]

    def _show(self, number: int, why: str) -> ShownRow:
        begin, end = (int(at) for at in self.samples.starts[number : number + 2])
        labelled = self.samples.labelled[begin:end].tolist()
        pieces = self.cutter.cut(self.samples.ids[begin:end].tolist(), labelled)
        weight = 1.0 if self.samples.weights is None else float(self.samples.weights[number])
        return ShownRow(self.samples.where(number), why, tuple(pieces), end - begin, sum(labelled), weight=weight)

    def _at(self, place: str) -> list[ShownRow]:
        file, _, line = place.rpartition(":")
        if not line.isdecimal() or int(line) < 1:
            raise UserError(f"--row {place}: expected a line number from 1, or FILE:LINE as messages name a row.")
        shown = [self._show(number, "") for number in _find(self.samples, file, int(line))]
        bad = [row for row in self.report.bad if _is_at(row.where, file, line)]
        shown += [ShownRow(row.where, "", note=f"a bad row: {row.reason}") for row in bad]
        return shown or [self._explain(place, file, int(line))]

    def _explain(self, place: str, file: str, line: int) -> ShownRow:
        """Say why a line gave no sample.

        Raises:
            UserError: there is no such line.
        """
        where = place if file else f"{self.split} line {line}"
        for name, other in self.others.items():
            held_out = [number for number in _find(other, file, line) if _file(other, number) in self.samples.files]
            if held_out:
                return ShownRow(where, "", note=f"is a row of {name}: --split {name} shows it.")
        bad_lines = [row.where.rpartition(":")[2] for row in self.report.bad]
        lines = [*self.samples.line.tolist(), *(int(number) for number in bad_lines if number.isdecimal())]
        last = max([self.report.rows, *lines])
        if line > last or (file and not any(name.endswith(file) for name in self.samples.files)):
            raise UserError(
                f"--row {place}: {self.split} has no such row; its {self.report.rows:,} rows end at {last}."
            )
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in self.report.dropped.items())
        dropped = f", or the row was dropped: {reasons}" if reasons else ""
        unlisted = self.report.bad_rows > len(self.report.bad)
        bad = ", or it is one of the bad rows that are not listed" if unlisted else ""
        return ShownRow(where, "", note=f"no sample comes from here: no row begins in that line{dropped}{bad}.")

    def _search(self, text: str) -> list[ShownRow]:
        found = [number for number, row in enumerate(self._decode_all()) if text.casefold() in row.casefold()]
        first = [self._show(number, f"holds {text!r}") for number in found[:_FOUND]]
        count = f"{len(found):,} of {len(self.samples):,} samples hold it"
        shown = f"; the first {_FOUND} are shown." if len(found) > _FOUND else "."
        return [ShownRow(f"search for {text!r}", "", note=count + shown), *first]

    def _decode_all(self) -> Iterator[str]:
        for begin in range(0, len(self.samples), _CHUNK):
            bounds = self.samples.starts[begin : begin + _CHUNK + 1].tolist()
            rows = [self.samples.ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
            yield from self.cutter.tokenizer.batch_decode(
                rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )


def _find(samples: SampleSet, file: str, line: int) -> list[int]:
    """Find the samples of a line, in any file if none is named."""
    numbers = np.flatnonzero(samples.line == line).tolist()
    return [number for number in numbers if _is_at(samples.where(number), file, str(line))]


def _is_at(where: str, file: str, line: str) -> bool:
    return where.endswith(f"{file}:{line}") if file else where.rpartition(":")[2] == line


def _file(samples: SampleSet, number: int) -> str:
    return samples.where(number).rpartition(":")[0]


@dataclass(frozen=True)
class Inspection:
    """All that terminal and page show.

    Attributes:
        config: name of the config.
        settings: what the data were prepared with, in words.
        splits: facts of each split, in order.
        ends: sentences on stop token and BOS, with whether all is well: ``(well, sentence)``.
        epoch: what an epoch of training costs; None if there are no training rows to report on.
        batch_size: rows per batch, if they are counted.
        rows: rows to show.
        rows_split: the split that they come from.
        notes: what else there is to say.
    """

    config: str
    settings: str
    splits: list[SplitFacts]
    ends: list[tuple[bool, str]]
    epoch: Epoch | None
    batch_size: int | None
    rows: list[ShownRow]
    rows_split: str
    notes: list[str] = field(default_factory=list)


def inspect_data(data: Any, config: Config, options: Options) -> Inspection:
    """Prepare all splits that the config names and gather what is to be shown.

    Args:
        data: an ``InstructionDataModule``, not yet set up.
        config: with the trainer's settings.
        options: which split and rows.

    Raises:
        UserError: the data cannot be prepared, or there is no such split or row.
    """
    data.setup()
    names = [name for name in SPLITS if name in data.reports and options.split in (None, name)]
    if not names:
        missing = f"data.{options.split}" if options.split else "data.train"
        raise UserError(f"there are no rows to inspect: {missing} names no file.")
    facts = [_split_facts(data, name) for name in names]
    samples = data.samples[names[0]]
    cutter = PieceCutter(data.tokenizer, data.stop_ids)
    others = {name: other for name, other in data.samples.items() if name != names[0]}
    rows = RowChooser(names[0], samples, data.reports[names[0]], cutter, others).choose(options)
    return Inspection(
        config=config.name,
        settings=_settings(data, config),
        splits=facts,
        ends=_describe_all_ends(data, [split.ends for split in facts if split.ends is not None]),
        epoch=_plan(data, config) if "train" in names else None,
        batch_size=data.batch_size,
        rows=rows,
        rows_split=names[0],
        notes=_notes(data, names),
    )


def _notes(data: Any, names: list[str]) -> list[str]:
    if not getattr(data, "streaming", False) or "train" not in names:
        return []
    return [
        f"Streaming: of train only the first {data.reports['train'].rows:,} rows were read; its figures are theirs."
    ]


def _describe_all_ends(data: Any, ends: list[Ends]) -> list[tuple[bool, str]]:
    """Describe the ends of all splits together, those of splits without a chat template by themselves."""
    sentences = []
    for written in (False, True):
        group = [of_split for of_split in ends if of_split.written == written]
        if group:
            with_bos = None if group[0].with_bos is None else sum(of_split.with_bos or 0 for of_split in group)
            counts = [sum(getattr(one, name) for one in group) for name in ("samples", "stopping", "doubled")]
            whole = Ends(counts[0], counts[1], with_bos, counts[2], written)
            sentences += describe_ends(whole, data.tokenizer, data.stop_ids)
    return sentences


def _plan(data: Any, config: Config) -> Epoch:
    streaming = getattr(data, "streaming", False)
    if not streaming:
        return plan_epoch(data.train_dataloader().plan, config.trainer)
    plan = EpochPlan(data.samples["train"], data.batch_size, data.tokens_per_batch, shuffle=True)
    return plan_epoch(plan, config.trainer, streaming=True)


def _split_facts(data: Any, name: str) -> SplitFacts:
    samples = data.samples[name]
    labels = percentiles(samples.labelled_counts) if name != "predict" else {}
    report, lengths = data.reports[name], samples.lengths
    ends = None
    if name != "predict":
        written = not _WRITTEN.isdisjoint(report.formats)
        ends = count_ends(samples, data.stop_ids, data.tokenizer.bos_token_id)._replace(written=written)
    held_out = name == "val" and data.val_fraction is not None
    sources = count_sources(samples, [] if name == "predict" else data.sources("train" if held_out else name))
    return SplitFacts(name, report, percentiles(lengths), labels, histogram(lengths), ends, sources)


_WRITTEN = {"text", "segments", "tokens"}  # formats without a chat template


def _settings(data: Any, config: Config) -> str:
    tokenizer = config.data.init_args.get("tokenizer")
    shown = {"tokenizer": tokenizer["name"] if isinstance(tokenizer, dict) else tokenizer}
    shown |= {key: getattr(data, key, None) for key in ("max_length", "too_long", "train_on")}
    defaults = {"reasoning": "template", "deduplicate": False, "shuffle": True}
    shown |= {key: value for key, default in defaults.items() if (value := getattr(data, key, default)) != default}
    return " · ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
