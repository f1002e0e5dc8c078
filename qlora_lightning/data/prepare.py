"""From rows to samples or prompts, with a report of what became of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_lightning.data.bad_rows import BadRow, RowFault
from qlora_lightning.data.chat import IGNORED, ChatRenderer
from qlora_lightning.data.conversations import to_conversation
from qlora_lightning.data.formats import Conversation, Format, choose_format
from qlora_lightning.data.prompts import Prompt
from qlora_lightning.data.reader import Row
from qlora_lightning.data.samples import Sample, make_sample, shorten
from qlora_lightning.errors import UserError

NO_LABEL = "no labelled token left"
_MAX_UNLABELLED = 0.05

Watch = Callable[[Sequence[Row]], Iterable[Row]]  # hands the rows on, showing how far it is


@dataclass
class Report:
    """What became of the rows of one split.

    Attributes:
        rows: rows read, bad ones included.
        formats: names of the formats found.
        tokens: tokens of all samples.
        labelled: of these, labelled ones.
        shortened: samples cut to ``max_length``.
        dropped: rows left out, by reason.
    """

    rows: int = 0
    formats: list[str] = field(default_factory=list)
    tokens: int = 0
    labelled: int = 0
    shortened: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add_unread(self, bad: Sequence[BadRow]) -> None:
        """Count the lines that the reader could not read."""
        self.rows += len(bad)
        self.dropped.update(row.reason for row in bad)

    def describe(self, split: str) -> str:
        """Return the line that is printed for a split."""
        parts = [f"{split}: {self.rows:,} rows ({', '.join(self.formats)})", f"{self.tokens:,} tokens"]
        if self.labelled:
            parts.append(f"{self.labelled / self.tokens:.0%} labelled")
        if self.shortened:
            parts.append(f"{self.shortened:,} shortened")
        if self.dropped:
            reasons = ", ".join(f"{count:,} of them: {reason}" for reason, count in self.dropped.most_common(3))
            parts.append(f"{self.dropped.total():,} dropped ({reasons})")
        return ", ".join(parts)


def count_samples(samples: Sequence[Sample], formats: list[str]) -> Report:
    """Return the report of samples that are ready, a part of a split."""
    tokens = sum(len(sample.ids) for sample in samples)
    labelled = sum(int((sample.labels != IGNORED).sum()) for sample in samples)
    return Report(len(samples), formats, tokens, labelled)


@dataclass(frozen=True)
class Recipe:
    """How rows are turned into samples: the settings that every split shares."""

    renderer: ChatRenderer
    format: str = "auto"
    system: str | None = None
    max_length: int = 2048


def prepare_samples(
    rows: Sequence[Row], recipe: Recipe, bad: list[BadRow], watch: Watch = iter
) -> tuple[list[Sample], Report]:
    """Turn rows into samples to train or validate on; a bad row is added to ``bad`` and left out.

    Raises:
        UserError: if the format is unclear, the template cannot be used, or more than 5 % of the rows keep no label.
    """
    report, samples = Report(len(rows)), list[Sample]()

    def use(row: Row, number: int, conversation: Conversation) -> None:
        ids, labels = recipe.renderer.render(conversation)
        short_ids, short_labels = shorten(ids, labels, recipe.max_length)
        labelled = sum(label != IGNORED for label in short_labels)
        if not labelled:
            report.dropped[NO_LABEL] += 1
            return
        report.shortened += len(short_ids) < len(ids)
        report.tokens += len(short_ids)
        report.labelled += labelled
        samples.append(make_sample(short_ids, short_labels, number))

    _each(rows, recipe, bad, watch, report, use, needs_answer=True)
    if report.dropped[NO_LABEL] > _MAX_UNLABELLED * len(rows):
        raise UserError(
            f"{report.dropped[NO_LABEL]} of {len(rows)} rows have {NO_LABEL} (more than {_MAX_UNLABELLED:.0%}): look "
            "at max_length and train_on."
        )
    return samples, report


def prepare_prompts(
    rows: Sequence[Row], recipe: Recipe, bad: list[BadRow], watch: Watch = iter
) -> tuple[list[Prompt], Report]:
    """Turn rows into prompts, whole whatever their length; an answer that a row ends in becomes its reference.

    Raises:
        UserError: if the format is unclear or the template cannot be used.
    """
    report, prompts = Report(len(rows)), list[Prompt]()

    def use(row: Row, number: int, conversation: Conversation) -> None:
        answered = conversation[-1]["role"] == "assistant"
        reference = conversation[-1]["content"] if answered else None
        ids = recipe.renderer.render_prompt(conversation[:-1] if answered else conversation)
        report.tokens += len(ids)
        prompts.append(Prompt(ids, reference, number, row.values))

    _each(rows, recipe, bad, watch, report, use, needs_answer=False)
    return prompts, report


def _each(
    rows: Sequence[Row],
    recipe: Recipe,
    bad: list[BadRow],
    watch: Watch,
    report: Report,
    use: Callable[[Row, int, Conversation], Any],
    needs_answer: bool,
) -> None:
    """Hand each row with its number and conversation to ``use``; collect the rows that cannot be used."""
    formats = _choose_formats(rows, recipe.format, needs_answer)
    report.formats = list(dict.fromkeys(form.name for form in formats.values()))
    for number, row in enumerate(watch(rows)):
        try:
            use(row, number, to_conversation(row.values, formats[row.file], recipe.system, needs_answer))
        except RowFault as fault:
            bad.append(BadRow(row.where, str(fault)))
            report.dropped[str(fault)] += 1
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error


def _choose_formats(rows: Sequence[Row], name: str, needs_answer: bool) -> dict[str, Format]:
    files: dict[str, list[Row]] = {}
    for row in rows:
        files.setdefault(row.file, []).append(row)
    return {file: choose_format(of_file, name, needs_answer) for file, of_file in files.items()}
