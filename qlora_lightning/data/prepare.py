"""From rows to samples or prompts, in chunks, with a report of what became of them."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from qlora_lightning.data.chat.labels import IGNORED, ChatRenderer, Rendered
from qlora_lightning.data.chat.lengths import shorten, split_up
from qlora_lightning.data.prompts import Prompt
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import SHOWN, BadRow, RowFault, refuse
from qlora_lightning.data.rows.conversation import Chat
from qlora_lightning.data.rows.formats import RowConverter
from qlora_lightning.data.rows.readers import REST_UNREAD, Row
from qlora_lightning.data.rows.sources import RowSettings
from qlora_lightning.data.samples import SampleSet, SampleSetBuilder, find_duplicates
from qlora_lightning.support.errors import UserError

TOO_LONG = "longer than max_length (too_long: drop)"
CHUNK = 512  # rows that are rendered and encoded together, by all cores

Rows = Iterable[Row | BadRow]
Watch = Callable[[int], object]  # told how many rows are done


@dataclass(frozen=True)
class Recipe:
    """How rows are turned into samples: the settings that every split shares."""

    renderer: ChatRenderer
    max_length: int = 2048
    too_long: str = "truncate"


class GoodRow(NamedTuple):
    """A row that is a chat, with its number in the split."""

    number: int
    row: Row
    chat: Chat


class Preparer:
    """Turns the rows of a source into samples, chunk by chunk.

    Args:
        recipe: the settings.
        converter: of the source.
        source: its number among the sources of the split.
        report: where it is counted what becomes of rows.
    """

    def __init__(self, recipe: Recipe, converter: RowConverter, source: int, report: Report) -> None:
        self.recipe, self.converter, self.source, self.report = recipe, converter, source, report

    def add(self, rows: Sequence[Row | BadRow], first_row: int, builder: SampleSetBuilder) -> None:
        """Append the samples of a chunk of rows, the first of which has this number in the split.

        Raises:
            UserError: if a row's format is unclear, or the template cannot be used.
        """
        good = list(self.convert(rows, first_row))
        for row, rendered in zip(good, self.recipe.renderer.render_all(row.chat for row in good), strict=True):
            try:
                if isinstance(rendered, UserError):
                    raise rendered
                self._add_samples(row, rendered, builder)
            except RowFault as fault:
                self.refuse(row.row.where, str(fault))
            except UserError as error:
                raise UserError(f"{row.row.where}: {error}") from error

    def convert(self, rows: Sequence[Row | BadRow], first_row: int) -> Iterator["GoodRow"]:
        """Yield the good rows of a chunk as chats; the bad ones are reported."""
        for number, row in enumerate(rows, start=first_row):
            self.report.rows += 1
            if isinstance(row, BadRow):
                self.refuse(*row)
                continue
            try:
                yield GoodRow(number, row, self.converter.convert(row))
            except RowFault as fault:
                self.refuse(row.where, str(fault))
        for found, names in (
            (self.report.formats, self.converter.formats),
            (self.report.unread_columns, self.converter.unread_columns),
        ):
            found += [name for name in names if name not in found]

    def refuse(self, where: str, reason: str) -> None:
        """Count a bad row, and keep the first of them, and each that ends the reading of its file."""
        self.report.bad_rows += 1
        if len(self.report.bad) < SHOWN or reason.endswith(REST_UNREAD):
            self.report.bad.append(BadRow(where, reason))

    def _add_samples(self, row: GoodRow, rendered: list[Rendered], builder: SampleSetBuilder) -> None:
        recipe, report = self.recipe, self.report
        made = 0
        for piece in self._fit(row, rendered):
            labelled = _count(piece.labels)
            if labelled:
                builder.add(piece.ids, piece.labels, row.number, self.source, row.row.file, row.row.line)
                report.samples += 1
                report.tokens += len(piece.ids)
                report.labelled += labelled
                made += 1
        report.turn_by_turn += len(rendered) > 1
        if made:
            return
        if recipe.too_long == "drop" and any(len(ids) > recipe.max_length for ids, _ in rendered):
            report.drop(TOO_LONG)
            return
        report.unusable += 1
        marked = not any(_count(labels) for _, labels in rendered)
        report.drop("every answer is marked `train: false`" if marked else "no labelled token within max_length")

    def _fit(self, row: GoodRow, rendered: list[Rendered]) -> list[Rendered]:
        """Return what becomes of the samples of a row, those that are too long as ``too_long`` says."""
        renderer, most, report = self.recipe.renderer, self.recipe.max_length, self.report
        long = [len(sample.ids) > most for sample in rendered]
        if not any(long):
            return rendered
        if self.recipe.too_long == "split":
            pieces = [split_up(sample, most) if cut else [sample] for sample, cut in zip(rendered, long, strict=True)]
            return [piece for of_sample in pieces for piece in of_sample]
        answers: list[list[int]] = [[]] * len(rendered)  # none to keep
        if self.recipe.too_long == "truncate":
            answers = renderer.find_answers(row.chat.messages, row.chat.tools, len(rendered))
        fitted = []
        for sample, cut, trained in zip(rendered, long, answers, strict=True):
            if not cut:
                fitted.append(sample)
                continue
            short = shorten(renderer, row.chat.messages, row.chat.tools, trained, most)
            report.lost_tokens += len(sample.ids)
            report.lost_labels += _count(sample.labels)
            if short is not None:
                report.shortened += 1
                report.lost_tokens -= len(short.ids)
                report.lost_labels -= _count(short.labels)
                fitted.append(short)
        return fitted


def prepare_samples(
    sources: Sequence[tuple[RowSettings, Rows]], recipe: Recipe, split: str, watch: Watch = lambda rows: None
) -> tuple[SampleSet, Report]:
    """Turn the rows of a split into samples to train or validate on; bad ones are reported and left out.

    Args:
        sources: of each source how its rows are read, and the rows.
        recipe: the settings that all sources share.
        split: its name.
        watch: told now and then how many rows are done.

    Raises:
        UserError: if a format is unclear, or the template cannot be used.
    """
    report, builder = Report(split), SampleSetBuilder()
    for number, (settings, rows) in enumerate(sources):
        converter = RowConverter(settings)
        preparer = Preparer(recipe, converter, number, report)
        for chunk in _chunks(rows, converter):
            preparer.add(chunk, report.rows, builder)
            watch(report.rows)
    samples = builder.build()
    report.duplicates, report.duplicate_pairs = find_duplicates(samples)
    return samples, report


def prepare_prompts(
    sources: Sequence[tuple[RowSettings, Rows]], recipe: Recipe, split: str, watch: Watch = lambda rows: None
) -> tuple[list[Prompt], Report]:
    """Turn rows into prompts, whole whatever their length; an answer that a row ends in becomes its reference.

    Raises:
        UserError: if a format is unclear or the template cannot be used.
    """
    report, prompts = Report(split), list[Prompt]()
    for source, (settings, rows) in enumerate(sources):
        converter = RowConverter(settings, needs_answer=False)
        preparer = Preparer(recipe, converter, source, report)
        for chunk in _chunks(rows, converter):
            for number, row, (conversation, tools, _) in preparer.convert(chunk, report.rows):
                answered = conversation[-1]["role"] == "assistant"
                reference = conversation[-1]["content"] if answered else None
                messages = conversation[:-1] if answered else conversation
                try:
                    ids = recipe.renderer.render_prompt(messages, tools)
                except RowFault as fault:
                    preparer.refuse(row.where, str(fault))
                    continue
                except UserError as error:
                    raise UserError(f"{row.where}: {error}") from error
                report.samples += 1
                report.tokens += len(ids)
                prompts.append(Prompt(ids, reference, number, row.values, row.file, row.line))
            watch(report.rows)
    return prompts, report


def _chunks(rows: Rows, converter: RowConverter) -> Iterator[list[Row | BadRow]]:
    """Yield the rows of a source in chunks; by the first one the source's settings are checked."""
    stream = iter(rows)
    chunk = list(islice(stream, CHUNK))
    converter.check([row for row in chunk if isinstance(row, Row)])
    while chunk:
        yield chunk
        chunk = list(islice(stream, CHUNK))


def _count(labels: list[int]) -> int:
    """Count labelled tokens; nothing predicts the first one."""
    return len(labels) - 1 - labels[1:].count(IGNORED)


_PATIENCE = 1.0  # seconds without a bar


@contextmanager
def rows_bar(description: str, show: bool = True) -> Iterator[Watch]:
    """Give what is told how many rows are done; after a second it draws a bar on standard error, gone at the end.

    In a file or a pipe there is none.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn()
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(description, total=None)  # how many there are is known when they have been read
    began = time.monotonic()

    def watch(rows: int) -> None:
        progress.update(task, completed=rows)
        if show and console.is_terminal and not progress.live.is_started and time.monotonic() - began > _PATIENCE:
            progress.start()

    try:
        yield watch
    finally:
        if progress.live.is_started:
            progress.stop()


_MAX_UNUSABLE = 0.05


def check_word(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is none of the known ones.

    Raises:
        UserError: it is none.
    """
    if value not in known:
        raise UserError(f"{name}: expected {', '.join(known[:-1])} or {known[-1]}, found {value!r}.")


def check_combinations(
    val: Any,
    val_fraction: float | None,
    batch_size: int | None,
    tokens_per_batch: int | None,
    group_by_length: bool,
    streaming: bool,
    own_rows: bool = False,
) -> None:
    """Refuse settings that contradict each other."""
    if val is not None and val_fraction is not None:
        raise UserError("val and val_fraction are both given: keep one, the file or the share of the training rows.")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(
            f"data.val_fraction is {val_fraction:g}: expected a share of the training rows between 0 and 1. For no "
            "validation set it to null; for validation rows of their own name a file in data.val."
        )
    if batch_size is not None and tokens_per_batch is not None:
        raise UserError("batch_size and tokens_per_batch are both given: keep one, rows or tokens per micro-batch.")
    for name, value in (("batch_size", batch_size), ("tokens_per_batch", tokens_per_batch)):
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, found {value}.")
    if streaming and val_fraction is not None:
        raise UserError("val_fraction needs all rows, which streaming never has: name validation rows in data.val.")
    if streaming and own_rows:
        raise UserError("streaming reads the files of data.train itself, so load_rows cannot be overridden beside it.")
    if streaming and group_by_length:
        raise UserError("group_by_length needs all rows, which streaming never has: use tokens_per_batch instead.")


def recount(split: str, samples: SampleSet, whole: Report) -> Report:
    """Report on samples that were divided off; what became of rows before that is told with the training rows."""
    report = Report(split, len(set(samples.row_ids.tolist())), formats=list(whole.formats))
    if split == "train":
        report = replace(whole, rows=report.rows + sum(whole.dropped.values()) + whole.bad_rows)
    report.samples, report.tokens, report.labelled = len(samples), len(samples.ids), int(samples.labelled.sum())
    report.duplicates, report.duplicate_pairs = find_duplicates(samples)
    return report


def as_row(row: Row | BadRow | dict[str, Any], split: str, number: int) -> Row | BadRow:
    """Give a plain dict a place, so that messages can name it."""
    if isinstance(row, Row | BadRow):
        return row
    if not isinstance(row, dict):
        raise UserError(f"load_rows({split!r}): expected rows or dicts, found {type(row).__name__} as row {number}.")
    return Row(row, split, number)


def refuse_bad(report: Report, skip: bool) -> None:
    """Stop at bad rows, unless they are to be skipped.

    Raises:
        UserError: there are bad rows and ``skip`` is off, or one of them hides the rest of its file.
    """
    if not skip:
        refuse(report.bad, total=report.bad_rows)
    # to skip a row was asked for, not the rest of a file
    refuse([row for row in report.bad if row.reason.endswith(REST_UNREAD)], skippable=False)


def refuse_unusable(report: Report, skip: bool) -> None:
    """Stop at bad rows, unless they are to be skipped and leave something to use.

    Raises:
        UserError: as ``refuse_bad``; or nothing is left.
    """
    refuse_bad(report, skip)
    if report.samples == 0:
        refuse(report.bad, skippable=False, total=report.bad_rows)
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in report.dropped.items())
        raise UserError(f"{report.split}: none of {report.rows:,} rows is left ({reasons}).")


def check_usable(report: Report) -> None:
    """Refuse a split of which too many rows are well-formed, but leave nothing to learn from.

    Raises:
        UserError: more than 5 % do.
    """
    if report.unusable > _MAX_UNUSABLE * report.rows:
        reasons = "; ".join(f"{count:,}: {why}" for why, count in report.dropped.items() if why != TOO_LONG)
        raise UserError(
            f"{report.unusable:,} of {report.rows:,} rows of {report.split} have no labelled token (more than "
            f"{_MAX_UNUSABLE:.0%}) and would teach nothing ({reasons}). `qlora-lightning inspect` shows them; look at "
            "max_length, train_on and `train: false`."
        )
