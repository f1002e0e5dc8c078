"""From rows to samples or prompts, in chunks, with a report of what became of them."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qlora_lightning.data.chat.labels import IGNORED, ChatRenderer, Rendered
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.prompts import Prompt
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow, RowFault
from qlora_lightning.data.rows.conversation import Chat, Content, Text
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, find_repeats
from qlora_lightning.support.errors import UserError

TOO_LONG = "longer than max_length (too_long: drop)"
CHUNK = 512  # rows that are rendered together: the tokenizer encodes them on all cores
_PAUSE = 10.0  # seconds between two lines, if there is no terminal

Rows = Iterable[Row | BadRow]
Sources = Sequence[tuple[RowSettings, Rows]]
"""How the rows of each source are read, and the rows."""
Watch = Callable[[int], object]
"""Called with the number of rows that are done."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How rows are turned into samples: the settings that every split shares."""

    renderer: ChatRenderer
    max_length: int = 2048
    too_long: str = "truncate"


class Converted(NamedTuple):
    """What a good row says, with its number in the split and that of its source."""

    number: int
    source: int
    row: Row
    content: Content


def prepare_samples(
    sources: Sources, recipe: Recipe, split: str, watch: Watch = lambda rows: None, deduplicate: bool = False
) -> tuple[SampleSet, Report]:
    """Turn the rows of a split into samples to train or validate on; bad ones are reported and left out.

    Args:
        sources: where the rows come from.
        recipe: the settings that all sources share.
        split: its name.
        watch: called now and then with the number of rows that are done.
        deduplicate: leave out rows that equal an earlier one.

    Raises:
        UserError: a format is unclear, or the template cannot be used.
    """
    report, builder = Report(split), SampleSetBuilder()
    for chunk in _convert_chunks(sources, report):
        render_rows(recipe, chunk, builder, report)
        watch(report.rows)
    samples = builder.build()
    if deduplicate:
        repeated = find_repeats(samples).row_ids
        samples = samples.take(np.flatnonzero(~np.isin(samples.row_ids, repeated)))
        if len(repeated):
            report.drop("equal to an earlier row (deduplicate: true)", len(repeated))
    else:
        report.count_duplicates(samples)
    report.count_samples(samples)
    return samples, report


def prepare_prompts(
    sources: Sources, recipe: Recipe, split: str, watch: Watch = lambda rows: None
) -> tuple[list[Prompt], Report]:
    """Turn rows into prompts, whole whatever their length; an answer that a row ends in becomes its reference.

    Raises:
        UserError: a format is unclear, or the template cannot be used.
    """
    report, prompts = Report(split), list[Prompt]()
    for chunk in _convert_chunks(sources, report, needs_answer=False):
        report.rows += len(chunk)
        for row in chunk:
            if isinstance(row, BadRow):
                report.refuse(row)
                continue
            with _counting_faults(row, report):
                prompts.append(_make_prompt(recipe.renderer, row))
        watch(report.rows)
    report.samples, report.tokens = len(prompts), sum(len(prompt.ids) for prompt in prompts)
    return prompts, report


def _make_prompt(renderer: ChatRenderer, converted: Converted) -> Prompt:
    number, _, row, chat = converted
    if not isinstance(chat, Chat):
        raise RowFault("holds no conversation, so there is nothing to answer")
    answered = chat.messages[-1]["role"] == "assistant"
    reference = chat.messages[-1]["content"] if answered else None
    ids = renderer.render_prompt(chat.messages[:-1] if answered else chat.messages, chat.tools)
    return Prompt(ids, reference, number, row.values, row.file, row.line)


def _convert_chunks(sources: Sources, report: Report, needs_answer: bool = True) -> Iterator[list[Converted | BadRow]]:
    """Yield the rows of all sources in chunks; a source is read, and its settings are checked, when its turn comes."""
    converters, done = [RowConverter(settings, needs_answer) for settings, _ in sources], 0
    for source, ((_, rows), converter) in enumerate(zip(sources, converters, strict=True)):
        stream = iter(rows)
        chunk = list(islice(stream, CHUNK))
        check_source(converter, chunk)
        while chunk:
            yield [convert_row(converter, row, number, source) for number, row in enumerate(chunk, start=done)]
            done += len(chunk)
            chunk = list(islice(stream, CHUNK))
    report.note_columns(converters)


def check_source(converter: RowConverter, rows: Rows) -> None:
    """Check the settings of a source against its first rows.

    Raises:
        UserError: they do not fit.
    """
    converter.check([row for row in islice(rows, CHUNK) if isinstance(row, Row)])


def convert_row(converter: RowConverter, row: Row | BadRow, number: int, source: int) -> Converted | BadRow:
    """Convert one row.

    Raises:
        UserError: no row of the source can be used.
    """
    if isinstance(row, BadRow):
        return row
    try:
        return Converted(number, source, row, converter.convert(row))
    except RowFault as fault:
        return BadRow(row.where, str(fault))


def render_rows(recipe: Recipe, rows: Sequence[Converted | BadRow], builder: SampleSetBuilder, report: Report) -> None:
    """Add the samples of rows to a builder, and what became of them to a report.

    Raises:
        UserError: the template cannot be used.
    """
    report.rows += len(rows)
    contents = [row.content for row in rows if isinstance(row, Converted)]
    rendered_rows = iter(recipe.renderer.render_all(contents))
    for row in rows:
        if isinstance(row, BadRow):
            report.refuse(row)
            continue
        with _counting_faults(row, report):
            rendered = next(rendered_rows)
            if isinstance(rendered, UserError):
                raise rendered
            _add_samples(recipe, row, rendered, builder, report)


@contextmanager
def _counting_faults(converted: Converted, report: Report) -> Iterator[None]:
    """Count a row that cannot be rendered as bad; add its place to an error that is not its own."""
    where = converted.row.where
    try:
        yield
    except RowFault as fault:
        report.refuse(BadRow(where, str(fault)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _add_samples(
    recipe: Recipe, converted: Converted, rendered: list[Rendered], builder: SampleSetBuilder, report: Report
) -> None:
    number, source, row, content = converted
    if not content.weight:
        report.drop("their weight is 0")
        return
    fitted = [sample for sample in _fit(recipe, content, rendered, report) if _count(sample)]
    report.turn_by_turn += len(rendered) > 1
    for sample in fitted:
        builder.add(sample.ids, sample.labels, number, source, row.file, row.line, content.weight)
    if fitted:
        return
    if recipe.too_long == "drop" and any(len(sample.ids) > recipe.max_length for sample in rendered):
        report.drop(TOO_LONG)
        return
    report.unusable += 1
    marked = not any(map(_count, rendered))
    report.drop("every answer is marked `train: false`" if marked else "no labelled token within max_length")


def _fit(recipe: Recipe, content: Content, rendered: list[Rendered], report: Report) -> list[Rendered]:
    """Return the samples of a row, those that are too long as ``too_long`` has them."""
    most = recipe.max_length
    if all(len(sample.ids) <= most for sample in rendered):
        return rendered
    document = isinstance(content, Text) and content.whole  # every piece of it is trained
    if document or recipe.too_long == "split":
        context = 1 if document else None
        return [piece for sample in rendered for piece in split_up(sample, most, context)]
    answers: list[list[int]] = [[]] * len(rendered)  # none to keep
    if recipe.too_long == "truncate" and isinstance(content, Chat):
        answers = recipe.renderer.find_answers(content.messages, content.tools, len(rendered))
    fitted = []
    for sample, trained in zip(rendered, answers, strict=True):
        if len(sample.ids) <= most:
            fitted.append(sample)
            continue
        if isinstance(content, Chat):
            short = shorten(recipe.renderer, content.messages, content.tools, trained, most)
        else:
            short = None if recipe.too_long == "drop" else Rendered(sample.ids[:most], sample.labels[:most])
        report.lost_tokens += len(sample.ids)
        report.lost_labels += _count(sample)
        if short is not None:
            report.shortened += 1
            report.lost_tokens -= len(short.ids)
            report.lost_labels -= _count(short)
            fitted.append(short)
    return fitted


def _count(sample: Rendered) -> int:
    """Count labelled tokens, on the list itself: an array of each row would be made for this alone."""
    return len(sample.labels) - sample.labels.count(IGNORED)


@contextmanager
def watch_rows(split: str, show: bool = True) -> Iterator[Watch]:
    """Show how many rows are done: on a terminal a bar, which is gone at the end, else a line every 10 seconds."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn()
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
    task = progress.add_task(split, total=None)  # how many there are is known when they have been read
    began = logged = time.monotonic()

    def watch(rows: int) -> None:
        nonlocal logged
        now = time.monotonic()
        progress.update(task, completed=rows)
        if show and not console.is_terminal and now - logged > _PAUSE:
            _log.info("%s: %s rows prepared, %.0f rows/s", split, f"{rows:,}", rows / (now - began))
            logged = now

    with progress:
        yield watch
