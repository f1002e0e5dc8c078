"""From rows to samples or prompts, in chunks, with a report of what became of them."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.data.chat.labels import IGNORED, ChatRenderer, Rendered
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.chat.render import RenderedText
from qlora_lightning.data.report import DataReport
from qlora_lightning.data.rows.bad_rows import BadRow, RowFault
from qlora_lightning.data.rows.conversation import Chat, Content, Judged, Pair, Text
from qlora_lightning.data.rows.convert import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, find_repeats, hold_out

TOO_LONG = "longer than max_length (too_long: drop)"
CHUNK = 512  # rows that are rendered together: the tokenizer encodes them on all cores
_PAUSE = 10.0  # seconds between two lines of the log
_log = logging.getLogger(__name__)

Rows = Iterable[Row | BadRow]
Sources = Sequence[tuple[RowSettings, Rows]]
"""How the rows of each source are read, and the rows."""
Prepared = tuple[SampleSet, DataReport]


@dataclass(frozen=True)
class Recipe:
    """How rows are turned into samples: the settings that every split shares.

    With ``pairs`` a row is two answers to compare, and its sample both, one behind the other; or one with a verdict.
    """

    renderer: ChatRenderer
    max_length: int = 2048
    too_long: str = "truncate"
    pairs: bool = False
    missing: tuple[str, ...] = ()  # answers that mean that there is none


class Prompt(NamedTuple):
    """One row to predict: the ids that generation starts from, the row's own answer if it has one, and the row."""

    ids: list[int]
    reference: str | None
    row_id: int
    values: dict[str, Any]


class _Converted(NamedTuple):
    """The content of a good row, with its number in the split and that of its source."""

    number: int
    source: int
    row: Row
    content: Content | Pair | Judged

    @property
    def parts(self) -> Sequence[Content]:
        """The content itself, or both of a pair."""
        if isinstance(self.content, Judged):
            return [self.content.chat]
        return self.content if isinstance(self.content, Pair) else [self.content]

    def texts_of(self, role: str) -> list[str]:
        """Return the texts of a role."""
        messages = [each for part in self.parts if isinstance(part, Chat) for each in part.messages]
        return [each["content"] for each in messages if each["role"] == role]


def prepare(
    sources: Sources,
    recipe: Recipe,
    split: str,
    deduplicate: bool = False,
    for_prompts: bool = False,
    show: bool = False,
) -> tuple[SampleSet, DataReport, list[Prompt]]:
    """Turn all rows of a split into samples, or into prompts for generation.

    A source is read, and its settings are checked, when its turn comes.

    Args:
        sources: where the rows come from.
        recipe: the settings that all sources share.
        split: its name.
        deduplicate: leave out rows that equal an earlier one.
        for_prompts: whether the rows are to be answered; they may lack answers. A sample of a prompt has no labels.
        show: log how many rows are done every 10 seconds.
    """
    preparation = _Preparation(recipe, split, for_prompts)
    report, logged = preparation.report, time.monotonic()
    pairs = recipe.pairs and not for_prompts
    converters = [RowConverter(settings, not for_prompts, pairs) for settings, _ in sources]
    for source, (converter, (_, rows)) in enumerate(zip(converters, sources, strict=True)):
        remaining = iter(rows)
        chunk = list(islice(remaining, CHUNK))
        converter.check([row for row in chunk if isinstance(row, Row)])
        while chunk:
            preparation.add(source, converter, chunk)
            if show and time.monotonic() - logged > _PAUSE:
                _log.info("%s: %s rows prepared", split, f"{report.rows:,}")
                logged = time.monotonic()
            chunk = list(islice(remaining, CHUNK))
        report.formats += [name for name in converter.formats if name not in report.formats]
        report.unread_columns += [name for name in converter.unread_columns if name not in report.unread_columns]
    samples = preparation.builder.build()
    if deduplicate and not for_prompts:
        repeated = find_repeats(samples).row_ids
        samples = samples.take(np.flatnonzero(~np.isin(samples.row_ids, repeated)))
        if len(repeated):
            report.drop("equal to an earlier row (deduplicate: true)", len(repeated))
    elif not for_prompts:
        report.count_duplicates(samples)
    report.count_samples(samples)
    return samples, report, preparation.prompts


def divide(samples: SampleSet, report: DataReport, fraction: float, seed: int) -> list[Prepared]:
    """Hold validation rows out of training rows; what became of rows before is reported with the training rows."""
    train, val = hold_out(samples, fraction, seed)
    left_out = sum(report.dropped.values()) + report.bad_rows
    divided = [
        (train, replace(report, rows=len(np.unique(train.row_ids)) + left_out)),
        (val, DataReport("val", len(np.unique(val.row_ids)), formats=report.formats, files=report.files)),
    ]
    for own, report in divided:
        report.count_samples(own)
        report.count_duplicates(own)
    return divided


class _Preparation:
    """Turns rows into samples; what becomes of a row depends on nothing but the row and the settings of its source."""

    def __init__(self, recipe: Recipe, split: str, for_prompts: bool) -> None:
        self._recipe, self._for_prompts = recipe, for_prompts
        self.report, self.builder, self.prompts = DataReport(split), SampleSetBuilder(), list[Prompt]()
        self._kind: type | None = None  # of all rows

    def add(self, source: int, converter: RowConverter, rows: Sequence[Row | BadRow]) -> None:
        """Add rows of a source; bad ones are reported and left out."""
        renderer, bad = self._recipe.renderer, dict[int, BadRow]()
        written: list[tuple[_Converted, list[list[RenderedText]]]] = []
        for number, row in enumerate(rows, start=self.report.rows):
            if isinstance(row, BadRow):
                bad[number] = row
                continue
            with _noting_faults(number, row, bad):
                each = _Converted(number, source, row, converter.convert(row))
                if self._for_prompts:
                    self._add_prompt(each)
                elif self._is_wanted(each):
                    written.append((each, [renderer.write(part) for part in each.parts]))
        encoded = iter(renderer.encode([text.text for _, parts in written for texts in parts for text in texts]))
        for each, parts in written:
            encodings = [[next(encoded) for _ in texts] for texts in parts]
            with _noting_faults(each.number, each.row, bad):
                self._add_samples(each, parts, list(map(renderer.label, each.parts, parts, encodings)))
        self.report.rows += len(rows)
        for number in sorted(bad):
            self.report.count_bad_row(bad[number])

    def _is_wanted(self, converted: _Converted) -> bool:
        """Whether a row is trained; one whose answer means none may be left out, or else is noted."""
        kind = type(converted.content)
        self._kind = self._kind or kind
        if Pair in (self._kind, kind) and self._kind is not kind:
            raise RowFault("two answers to compare and answers with a verdict do not mix: give each a run")
        answers = {text.strip() for text in converted.texts_of("assistant")}
        if not answers.isdisjoint(self._recipe.missing):
            self.report.drop("an answer is one of data.missing")
            return False
        self.report.note_suspicious(converted.row.where, answers, converted.texts_of("user"))
        return True

    def _add_prompt(self, converted: _Converted) -> None:
        number, source, row, content = converted
        if not isinstance(content, Chat):
            raise RowFault("holds no conversation, so there is nothing to answer")
        *asked, last = content.messages
        reference = last["content"] if last["role"] == "assistant" else None
        ids = self._recipe.renderer.render_prompt(content.messages if reference is None else asked, content.tools)
        self.builder.add(ids, [IGNORED] * len(ids), number, source, row.file, row.line)
        self.prompts.append(Prompt(ids, reference, number, row.values))

    def _add_samples(
        self, converted: _Converted, parts: list[list[RenderedText]], rendered: list[list[Rendered]]
    ) -> None:
        """Add the samples of a row, or count why it has none: ``rendered`` is of each part its samples."""
        (number, source, row, content), report = converted, self.report
        fitted = [
            [sample for sample in self._fit(*part) if _count(sample)]
            for part in zip(converted.parts, parts, rendered, strict=True)
        ]
        turn_by_turn = any(len(samples) > 1 for samples in rendered)
        whole = [sample for samples in rendered for sample in samples]
        if isinstance(content, Pair | Judged) and turn_by_turn:
            report.leave_untrained("the chat template makes several samples of an answer, which cannot be compared")
        elif not any(map(_count, whole)):
            report.leave_untrained("every answer is marked `train: false`")
        elif not all(fitted):
            if self._recipe.too_long == "drop" and any(len(sample.ids) > self._recipe.max_length for sample in whole):
                report.drop(TOO_LONG)
            else:
                report.leave_untrained("no labelled token within max_length")
        elif isinstance(content, Pair):
            (chosen,), (rejected,) = fitted
            if chosen == rejected:
                report.drop("their two answers are the same within max_length")
            elif fitted != rendered and _prompt_of(chosen) != _prompt_of(rejected):
                report.drop("their prompt is too long for the two answers to share what is left of it")
            else:
                ids, labels = chosen.ids + rejected.ids, chosen.labels + rejected.labels
                self.builder.add(ids, labels, number, source, row.file, row.line, len(chosen.ids))
        else:
            desirable = content.desirable if isinstance(content, Judged) else None
            for ids, labels in fitted[0]:
                self.builder.add(ids, labels, number, source, row.file, row.line, desirable=desirable)

    def _fit(self, content: Content, texts: list[RenderedText], rendered: list[Rendered]) -> list[Rendered]:
        """Return the samples of a content, those that are too long as ``too_long`` has them."""
        most, too_long, renderer = self._recipe.max_length, self._recipe.too_long, self._recipe.renderer
        if all(len(sample.ids) <= most for sample in rendered):
            return rendered
        if isinstance(content, Text) or too_long == "split":
            context = 1 if isinstance(content, Text) else None  # every piece of a text is trained
            return [piece for sample in rendered for piece in split_up(sample, most, context)]
        fitted = list[Rendered]()
        if too_long == "truncate" and isinstance(content, Chat):
            for sample, text in zip(rendered, texts, strict=True):
                trained = [answer.message for answer in text.answers]
                is_long = len(sample.ids) > most
                short = shorten(renderer, content.messages, content.tools, trained, most) if is_long else sample
                fitted += [] if short is None else [short]
                self.report.shortened += is_long and short is not None
        elif too_long == "truncate":
            fitted = [Rendered(sample.ids[:most], sample.labels[:most]) for sample in rendered]
            self.report.shortened += len(fitted)
        self.report.lost_labels += sum(map(_count, rendered)) - sum(map(_count, fitted))
        return fitted


@contextmanager
def _noting_faults(number: int, row: Row, bad: dict[int, BadRow]) -> Iterator[None]:
    """Note a row that cannot be used as bad."""
    try:
        yield
    except RowFault as fault:
        bad[number] = BadRow(row.where, str(fault))


def _prompt_of(sample: Rendered) -> list[int]:
    return sample.ids[: next(at for at, label in enumerate(sample.labels) if label != IGNORED)]


def _count(sample: Rendered) -> int:
    """Count labelled tokens."""
    return len(sample.labels) - sample.labels.count(IGNORED)
