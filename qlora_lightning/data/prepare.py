"""From rows to samples or prompts, in chunks, with a report of what became of them."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.data.chat.labels import IGNORED, ChatRenderer, Rendered
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.chat.render import RenderedText
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow, RowFault
from qlora_lightning.data.rows.conversation import Chat, Content, Judged, Pair, Text
from qlora_lightning.data.rows.convert import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, find_repeats
from qlora_lightning.support.errors import UserError

TOO_LONG = "longer than max_length (too_long: drop)"
CHUNK = 512  # rows that are rendered together: the tokenizer encodes them on all cores
_PAUSE = 10.0  # seconds between two lines of the log
_log = logging.getLogger(__name__)

Rows = Iterable[Row | BadRow]
Sources = Sequence[tuple[RowSettings, Rows]]
"""How the rows of each source are read, and the rows."""
Prepared = tuple[SampleSet, Report]


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
        return [each["content"] for each in messages if each["role"] == role and isinstance(each.get("content"), str)]


class Prompt(NamedTuple):
    """One row to predict: the ids that generation starts from, the row's own answer if it has one, and the row."""

    ids: list[int]
    reference: str | None
    row_id: int
    values: dict[str, Any]


class _Preparation:
    """Turns rows into samples; what becomes of a row depends on nothing but the row and the settings of its source.

    Args:
        recipe: the settings that all sources share.
        split: its name.
        settings: of each source.
        for_prompts: make a prompt of each row instead, whole whatever its length; a sample of it has no labels.
    """

    def __init__(self, recipe: Recipe, split: str, settings: Iterable[RowSettings], for_prompts: bool = False) -> None:
        self._recipe, self._for_prompts = recipe, for_prompts
        pairs = recipe.pairs and not for_prompts
        self._converters = [RowConverter(each, not for_prompts, pairs) for each in settings]
        self.report, self._builder = Report(split), SampleSetBuilder()
        self.prompts: list[Prompt] = []
        self._kind: type | None = None  # of all rows

    def check(self, source: int, rows: Sequence[Row | BadRow]) -> None:
        """Check the settings of a source against its first rows."""
        self._converters[source].check([row for row in rows if isinstance(row, Row)])

    def add(self, source: int, rows: Sequence[Row | BadRow]) -> None:
        """Add rows of a source; bad ones are reported and left out."""
        renderer, bad = self._recipe.renderer, dict[int, BadRow]()
        good: list[_Converted] = []
        for number, row in enumerate(rows, start=self.report.rows):
            if isinstance(row, BadRow):
                bad[number] = row
                continue
            try:
                each = _Converted(number, source, row, self._converters[source].convert(row))
                self._kind = self._kind or type(each.content)
                if Pair in (self._kind, type(each.content)) and self._kind is not type(each.content):
                    raise RowFault("two answers to compare and answers with a verdict do not mix: give each a run")
            except RowFault as fault:
                bad[number] = BadRow(row.where, str(fault))
                continue
            if not self._for_prompts:
                answers = {text.strip() for text in each.texts_of("assistant")}
                if not answers.isdisjoint(self._recipe.missing):
                    self.report.drop("an answer is one of data.missing")
                    continue
                self.report.note_suspicious(row.where, answers, each.texts_of("user"))
            good.append(each)
        written: list[tuple[_Converted, list[list[RenderedText]]]] = []
        for each in good:
            with _noting_faults(each, bad):
                if self._for_prompts:
                    self._add_prompt(each)
                else:
                    written.append((each, [renderer.write(part) for part in each.parts]))
        encoded = iter(renderer.encode([text.text for _, parts in written for texts in parts for text in texts]))
        for each, parts in written:
            encodings = [[next(encoded) for _ in texts] for texts in parts]
            with _noting_faults(each, bad):
                self._add_samples(each, list(map(renderer.label, each.parts, parts, encodings)))
        self.report.rows += len(rows)
        for number in sorted(bad):
            self.report.count_bad_row(bad[number])

    def take(self) -> Prepared:
        """Return the samples of all rows, and the report on them."""
        samples, report = self._builder.build(), self.report
        report.count_samples(samples)
        for each in self._converters:
            report.formats += [name for name in each.formats if name not in report.formats]
            report.unread_columns += [name for name in each.unread_columns if name not in report.unread_columns]
        return samples, report

    def _add_prompt(self, converted: _Converted) -> None:
        number, source, row, content = converted
        if not isinstance(content, Chat):
            raise RowFault("holds no conversation, so there is nothing to answer")
        *asked, last = content.messages
        reference = last["content"] if last["role"] == "assistant" else None
        ids = self._recipe.renderer.render_prompt(content.messages if reference is None else asked, content.tools)
        self._builder.add(ids, [IGNORED] * len(ids), number, source, row.file, row.line)
        self.prompts.append(Prompt(ids, reference, number, row.values))

    def _add_samples(self, converted: _Converted, parts: list[list[Rendered]]) -> None:
        (number, source, row, content), recipe, report = converted, self._recipe, self.report
        fitted = [
            [sample for sample in _fit(recipe, part, samples, report) if _count(sample)]
            for part, samples in zip(converted.parts, parts, strict=True)
        ]
        rendered = [sample for samples in parts for sample in samples]
        turn_by_turn = len(rendered) > len(parts)
        report.turn_by_turn += turn_by_turn
        is_pair, is_judged = isinstance(content, Pair), isinstance(content, Judged)
        if is_pair and not turn_by_turn and all(fitted):
            (chosen,), (rejected,) = fitted
            if chosen == rejected:
                report.drop("their two answers are the same within max_length")
            elif fitted != parts and _prompt_of(chosen) != _prompt_of(rejected):
                report.drop("their prompt is too long for the two answers to share what is left of it")
            else:
                ids, labels = chosen.ids + rejected.ids, chosen.labels + rejected.labels
                self._builder.add(ids, labels, number, source, row.file, row.line, len(chosen.ids))
        elif not is_pair and fitted[0] and not (is_judged and turn_by_turn):
            desirable = content.desirable if isinstance(content, Judged) else None
            for ids, labels in fitted[0]:
                self._builder.add(ids, labels, number, source, row.file, row.line, desirable=desirable)
        elif recipe.too_long == "drop" and any(len(sample.ids) > recipe.max_length for sample in rendered):
            report.drop(TOO_LONG)
        else:
            report.unusable += 1
            reason = "no labelled token within max_length"
            if (is_pair or is_judged) and turn_by_turn:
                reason = "the chat template makes several samples of an answer, which cannot be compared"
            elif not any(map(_count, rendered)):
                reason = "every answer is marked `train: false`"
            report.drop(reason)


@contextmanager
def _noting_faults(converted: _Converted, bad: dict[int, BadRow]) -> Iterator[None]:
    """Note a row that cannot be rendered as bad; add its file and line to an error that is not its own."""
    where = converted.row.where
    try:
        yield
    except RowFault as fault:
        bad[converted.number] = BadRow(where, str(fault))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def prepare(
    sources: Sources,
    recipe: Recipe,
    split: str,
    deduplicate: bool = False,
    for_prompts: bool = False,
    show: bool = False,
) -> tuple[SampleSet, Report, list[Prompt]]:
    """Turn all rows of a split into samples, or into prompts for generation.

    A source is read, and its settings are checked, when its turn comes.

    Args:
        sources: where the rows come from.
        recipe: the settings that all sources share.
        split: its name.
        deduplicate: leave out rows that equal an earlier one.
        for_prompts: whether the rows are to be answered; they may lack answers.
        show: log how many rows are done every 10 seconds.
    """
    preparation = _Preparation(recipe, split, [settings for settings, _ in sources], for_prompts)
    began = logged = time.monotonic()
    for source, (_, rows) in enumerate(sources):
        remaining = iter(rows)
        chunk = list(islice(remaining, CHUNK))
        preparation.check(source, chunk)
        while chunk:
            preparation.add(source, chunk)
            now = time.monotonic()
            if show and now - logged > _PAUSE:
                done = preparation.report.rows
                _log.info("%s: %s rows prepared, %.0f rows/s", split, f"{done:,}", done / (now - began))
                logged = now
            chunk = list(islice(remaining, CHUNK))
    samples, report = preparation.take()
    if for_prompts:
        return samples, report, preparation.prompts
    if deduplicate:
        repeated = find_repeats(samples).row_ids
        samples = samples.take(np.flatnonzero(~np.isin(samples.row_ids, repeated)))
        if len(repeated):
            report.drop("equal to an earlier row (deduplicate: true)", len(repeated))
        report.count_samples(samples)
    else:
        report.count_duplicates(samples)
    return samples, report, []


def _fit(recipe: Recipe, content: Content, rendered: list[Rendered], report: Report) -> list[Rendered]:
    """Return the samples of a row, those that are too long as ``too_long`` has them."""
    most = recipe.max_length
    if all(len(sample.ids) <= most for sample in rendered):
        return rendered
    if isinstance(content, Text) or recipe.too_long == "split":
        context = 1 if isinstance(content, Text) else None  # every piece of a text is trained
        return [piece for sample in rendered for piece in split_up(sample, most, context)]
    fitted = list[Rendered]()
    if recipe.too_long == "truncate" and isinstance(content, Chat):
        renderer, messages, tools = recipe.renderer, content.messages, content.tools
        for sample, trained in zip(rendered, renderer.split_answers(messages, tools, len(rendered)), strict=True):
            short = sample if len(sample.ids) <= most else shorten(renderer, messages, tools, trained, most)
            fitted += [] if short is None else [short]
            report.shortened += short not in (None, sample)
    elif recipe.too_long == "truncate":
        fitted = [Rendered(sample.ids[:most], sample.labels[:most]) for sample in rendered]
        report.shortened += len(fitted)
    report.lost_tokens += sum(len(sample.ids) for sample in rendered) - sum(len(sample.ids) for sample in fitted)
    report.lost_labels += sum(map(_count, rendered)) - sum(map(_count, fitted))
    return fitted


def _prompt_of(sample: Rendered) -> list[int]:
    return sample.ids[: next(at for at, label in enumerate(sample.labels) if label != IGNORED)]


def _count(sample: Rendered) -> int:
    """Count labelled tokens."""
    return len(sample.labels) - sample.labels.count(IGNORED)
