"""From rows to samples or prompts, in chunks and on all cores, with a report of what became of them."""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from types import ModuleType
from typing import NamedTuple

from qlora_lightning.data.chat.labels import IGNORED, ChatRenderer, Rendered
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.prompts import Prompt
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow, RowFault
from qlora_lightning.data.rows.conversation import Chat, Content, Text
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, drop_duplicates, find_duplicates
from qlora_lightning.support.errors import UserError

TOO_LONG = "longer than max_length (too_long: drop)"
CHUNK = 512  # rows that are rendered and encoded together
MANY = 20_000  # more rows than these are rendered by other processes, which take a second to start

Rows = Iterable[Row | BadRow]
Watch = Callable[[int], object]  # called with the number of rows that are done
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How rows are turned into samples: the settings that every split shares."""

    renderer: ChatRenderer
    max_length: int = 2048
    too_long: str = "truncate"


class Converted(NamedTuple):
    """What a good row says, with its number in the split, that of its source, and its place."""

    number: int
    source: int
    row: Row
    content: Content


ConvertedRows = list[Converted | BadRow]


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


def render_rows(recipe: Recipe, rows: ConvertedRows) -> tuple[SampleSet, Report]:
    """Turn rows into samples; the report is to be added to that of the split.

    Raises:
        UserError: the template cannot be used.
    """
    report, builder = Report("", rows=len(rows)), SampleSetBuilder()
    contents = [row.content for row in rows if isinstance(row, Converted)]
    rendered_rows = iter(recipe.renderer.render_all(contents))
    for row in rows:
        if isinstance(row, BadRow):
            report.refuse(row)
            continue
        rendered = next(rendered_rows)
        try:
            if isinstance(rendered, UserError):
                raise rendered
            _add_samples(recipe, row, rendered, builder, report)
        except RowFault as fault:
            report.refuse(BadRow(row.row.where, str(fault)))
        except UserError as error:
            raise UserError(f"{row.row.where}: {error}") from error
    samples = builder.build()
    report.count_samples(samples)
    return samples, report


def _add_samples(
    recipe: Recipe, row: Converted, rendered: list[Rendered], builder: SampleSetBuilder, report: Report
) -> None:
    weight, made = row.content.weight, 0
    if not weight:
        report.drop("their weight is 0")
        return
    for piece in _fit(recipe, row.content, rendered, report):
        if _count(piece.labels):
            builder.add(piece.ids, piece.labels, row.number, row.source, row.row.file, row.row.line, weight)
            made += 1
    report.turn_by_turn += len(rendered) > 1
    if made:
        return
    if recipe.too_long == "drop" and any(len(sample.ids) > recipe.max_length for sample in rendered):
        report.drop(TOO_LONG)
        return
    report.unusable += 1
    marked = not any(_count(sample.labels) for sample in rendered)
    report.drop("every answer is marked `train: false`" if marked else "no labelled token within max_length")


def _fit(recipe: Recipe, content: Content, rendered: list[Rendered], report: Report) -> list[Rendered]:
    """Return what becomes of the samples of a row, those that are too long as ``too_long`` says."""
    renderer, most = recipe.renderer, recipe.max_length
    long = [len(sample.ids) > most for sample in rendered]
    if not any(long):
        return rendered
    if isinstance(content, Text) and content.whole:  # a document: every piece of it is trained
        return [piece for sample in rendered for piece in split_up(sample, most, context=1)]
    if recipe.too_long == "split":
        pieces = [split_up(sample, most) if cut else [sample] for sample, cut in zip(rendered, long, strict=True)]
        return [piece for of_sample in pieces for piece in of_sample]
    answers: list[list[int]] = [[]] * len(rendered)  # none to keep
    if recipe.too_long == "truncate" and isinstance(content, Chat):
        answers = renderer.find_answers(content.messages, content.tools, len(rendered))
    fitted = []
    for sample, cut, trained in zip(rendered, long, answers, strict=True):
        if not cut:
            fitted.append(sample)
            continue
        if isinstance(content, Chat):
            short = shorten(renderer, content.messages, content.tools, trained, most)
        else:
            short = None if recipe.too_long == "drop" else Rendered(sample.ids[:most], sample.labels[:most])
        report.lost_tokens += len(sample.ids)
        report.lost_labels += _count(sample.labels)
        if short is not None:
            report.shortened += 1
            report.lost_tokens -= len(short.ids)
            report.lost_labels -= _count(short.labels)
            fitted.append(short)
    return fitted


def _count(labels: list[int]) -> int:
    """Count labelled tokens, on the list itself: an array of each row would be made for this alone."""
    return len(labels) - labels.count(IGNORED)


def prepare_samples(
    sources: Sequence[tuple[RowSettings, Rows]],
    recipe: Recipe,
    split: str,
    watch: Watch = lambda rows: None,
    deduplicate: bool = False,
) -> tuple[SampleSet, Report]:
    """Turn the rows of a split into samples to train or validate on; bad ones are reported and left out.

    Args:
        sources: of each source how its rows are read, and the rows.
        recipe: the settings that all sources share.
        split: its name.
        watch: called now and then with the number of rows that are done.
        deduplicate: leave out rows that equal an earlier one.

    Raises:
        UserError: a format is unclear, or the template cannot be used.
    """
    report, builder = Report(split), SampleSetBuilder()
    converters = [RowConverter(settings) for settings, _ in sources]
    for samples, more in _render_in_order(_convert_all(sources, converters), recipe):
        builder.extend(samples)
        report.add(more)
        watch(report.rows)
    for converter in converters:
        report.note_columns(converter.formats, converter.unread_columns)
    samples = builder.build()
    repeats = find_duplicates(samples)
    if deduplicate and repeats.rows:
        report.drop("equal to an earlier row (deduplicate: true)", repeats.rows)
        samples = drop_duplicates(samples)
        report.count_samples(samples)
    else:
        report.duplicates, report.duplicate_pairs = repeats
    return samples, report


def prepare_prompts(
    sources: Sequence[tuple[RowSettings, Rows]], recipe: Recipe, split: str, watch: Watch = lambda rows: None
) -> tuple[list[Prompt], Report]:
    """Turn rows into prompts, whole whatever their length; an answer that a row ends in becomes its reference.

    Raises:
        UserError: a format is unclear, or the template cannot be used.
    """
    report, prompts = Report(split), list[Prompt]()
    converters = [RowConverter(settings, needs_answer=False) for settings, _ in sources]
    for chunk in _convert_all(sources, converters):
        report.rows += len(chunk)
        for each in chunk:
            if isinstance(each, BadRow):
                report.refuse(each)
                continue
            try:
                prompt = _make_prompt(recipe.renderer, each)
            except RowFault as fault:
                report.refuse(BadRow(each.row.where, str(fault)))
                continue
            except UserError as error:
                raise UserError(f"{each.row.where}: {error}") from error
            report.samples += 1
            report.tokens += len(prompt.ids)
            prompts.append(prompt)
        watch(report.rows)
    for converter in converters:
        report.note_columns(converter.formats, converter.unread_columns)
    return prompts, report


def _make_prompt(renderer: ChatRenderer, converted: Converted) -> Prompt:
    number, _, row, chat = converted
    if not isinstance(chat, Chat):
        raise RowFault("holds no conversation, so there is nothing to answer")
    answered = chat.messages[-1]["role"] == "assistant"
    reference = chat.messages[-1]["content"] if answered else None
    ids = renderer.render_prompt(chat.messages[:-1] if answered else chat.messages, chat.tools)
    return Prompt(ids, reference, number, row.values, row.file, row.line)


def _convert_all(
    sources: Sequence[tuple[RowSettings, Rows]], converters: Sequence[RowConverter]
) -> Iterator[ConvertedRows]:
    """Yield the rows of all sources in chunks; a source is read, and its settings are checked, when its turn comes."""
    done = 0
    for source, ((_, rows), converter) in enumerate(zip(sources, converters, strict=True)):
        stream = iter(rows)
        chunk = list(islice(stream, CHUNK))
        check_source(converter, chunk)
        while chunk:
            yield [convert_row(converter, row, number, source) for number, row in enumerate(chunk, start=done)]
            done += len(chunk)
            chunk = list(islice(stream, CHUNK))


# ---- on all cores ----------------------------------------------------------------------------------------------------


def _render_in_order(chunks: Iterator[ConvertedRows], recipe: Recipe) -> Iterator[tuple[SampleSet, Report]]:
    """Render chunks one after the other; of many rows in other processes, with the same results in the same order.

    Few chunks are on their way at a time, so that memory does not grow with the rows.
    """
    first: list[ConvertedRows] = []
    try:
        while sum(map(len, first)) <= MANY and (chunk := next(chunks, None)):
            first.append(chunk)
    except UserError:
        for chunk in first:  # an error of earlier rows comes first
            yield render_rows(recipe, chunk)
        raise
    pool = _start_pool(recipe) if sum(map(len, first)) > MANY else None
    if pool is None:
        for chunk in chain(first, chunks):
            yield render_rows(recipe, chunk)
        return
    try:
        yield from _render_in_pool(chain(first, chunks), recipe, pool)
    finally:
        pool.stop()


def _render_in_pool(
    chunks: Iterator[ConvertedRows], recipe: Recipe, pool: "_Pool"
) -> Iterator[tuple[SampleSet, Report]]:
    sent: deque[tuple[ConvertedRows, Future[tuple[SampleSet, Report]] | None]] = deque()
    while True:
        try:
            chunk = next(chunks, None)
        except UserError:
            for each in sent:
                yield _receive(recipe, *each)
            raise
        if chunk is None:
            break
        if not sent and not pool.is_ready():  # it takes a second or two to start
            yield render_rows(recipe, chunk)
            continue
        sent.append((chunk, pool.send(chunk)))
        if len(sent) > 2 * pool.workers:
            yield _receive(recipe, *sent.popleft())
    for each in sent:
        yield _receive(recipe, *each)


def _receive(
    recipe: Recipe, chunk: ConvertedRows, future: Future[tuple[SampleSet, Report]] | None
) -> tuple[SampleSet, Report]:
    try:
        return render_rows(recipe, chunk) if future is None else future.result()
    except BrokenProcessPool:  # killed, usually for memory
        return render_rows(recipe, chunk)


class _Pool:
    """Worker processes that render chunks.

    ``multiprocessing`` would run the user's script again in each of them, which may have no ``__main__`` guard: here
    they begin without it.
    """

    def __init__(self, recipe: Recipe, workers: int) -> None:
        self.workers = workers
        spawn = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(workers, spawn, _begin_worker, (recipe,))
        # A process starts with each of the first tasks: all of them now.
        self._first = [self._executor.submit(os.getpid) for _ in range(workers)]

    def is_ready(self) -> bool:
        """Return whether a worker has started."""
        return any(first.done() and first.exception() is None for first in self._first)

    def send(self, chunk: ConvertedRows) -> Future[tuple[SampleSet, Report]] | None:
        """Have a chunk rendered; None if the workers have been killed."""
        sent = [each if isinstance(each, BadRow) else _without_values(each) for each in chunk]
        try:
            return self._executor.submit(_render_in_worker, sent)
        except BrokenProcessPool:
            return None

    def stop(self) -> None:
        """End the workers."""
        self._executor.shutdown(cancel_futures=True)


def _without_values(converted: Converted) -> Converted:
    return converted._replace(row=converted.row._replace(values={}))


def _start_pool(recipe: Recipe) -> _Pool | None:
    """Start worker processes; None if there can be none, or the renderer cannot be sent to them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2 or multiprocessing.current_process().daemon:
        return None
    with _without_main():
        try:
            pickle.dumps(recipe)
        except (pickle.PicklingError, AttributeError, TypeError):  # it holds something of the user's script
            return None
        return _Pool(recipe, min(cores, 16))


@contextmanager
def _without_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_recipe: Recipe  # of a worker


def _begin_worker(recipe: Recipe) -> None:
    global _recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has its worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _recipe = recipe


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _render_in_worker(chunk: ConvertedRows) -> tuple[SampleSet, Report]:
    return render_rows(_recipe, chunk)


# ---- progress --------------------------------------------------------------------------------------------------------

_PATIENCE = 1.0  # seconds without a bar
_PAUSE = 10.0  # seconds between two lines, if there is no terminal


@contextmanager
def watch_rows(split: str, show: bool = True) -> Iterator[Watch]:
    """Show how many rows are done: on a terminal a bar, which is gone at the end, else a line every 10 seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn()
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(split, total=None)  # how many there are is known when they have been read
    began = logged = time.monotonic()

    def watch(rows: int) -> None:
        nonlocal logged
        now = time.monotonic()
        progress.update(task, completed=rows)
        if not show:
            return
        if console.is_terminal:
            if not progress.live.is_started and now - began > _PATIENCE:
                progress.start()
        elif now - logged > _PAUSE:
            _log.info("%s: %s rows prepared, %.0f rows/s", split, f"{rows:,}", rows / (now - began))
            logged = now

    try:
        yield watch
    finally:
        if progress.live.is_started:
            progress.stop()
