"""``qlora-lightning inspect``: the data as the model will see them, in the terminal and as a page."""

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.commands.options import OptionParser, check_output, quiet_lightning
from qlora_lightning.data.chat.templates import ControlTokens
from qlora_lightning.data.rows.files import Source
from qlora_lightning.data.samples import SampleSet
from qlora_lightning.support.console import count_of, make_table, say, show_controls, terminal
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import write_whole

_VERBS = {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}  # which command reads a split
_DESCRIPTION = """Report on the data of a config, and show rows as the model sees them. No model is loaded.

Pass the same config as to `fit`, or the config.yaml of a run folder. You can override any key on the command line, as
with `fit`: --data.max_length 512, --trainer.devices 4."""
_EPILOG = """examples:
  qlora-lightning inspect --config configs/quickstart.yaml
  qlora-lightning inspect --config configs/quickstart.yaml --row 17 --row 23
  qlora-lightning inspect --config configs/quickstart.yaml --split val --longest --html data.html

The last line says whether `fit` would start on these rows (for other splits: `test`, `predict`). If not, it says why,
and the exit code is 2. This happens if there are bad rows (unless `on_bad_row: skip`), or if too many rows leave
nothing to train on."""
_PERCENTILES = {"min": 0, "5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99, "max": 100}
_MARKS = Text("⟦labeled tokens⟧ · ■ stop token · │ between tokens · ↵ newline")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character yet
_MAX_CHARACTER_TOKENS = 16
_DEFAULT_ROWS = 2  # shown if none are requested


def main(argv: Sequence[str]) -> int:
    """Report on the data of a config; return the exit code."""
    parser = OptionParser("inspect", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_argument
    add("--split", choices=_VERBS, help="report only on this split (default: all splits, and rows of the first)")
    row_help = "show the row at line N, or at FILE:N, as messages name it; may be repeated"
    add("--row", action="append", default=[], metavar="N", help=row_help)
    add("--longest", action="store_true", help="show the longest row")
    add("--html", metavar="FILE", help="also write the output to a page, with its colors")
    add("--force", action="store_true", help="overwrite an existing file")
    options, fit_options = parser.parse_known_args(argv)
    page = check_output("--html", options.html, options.force)
    # here, so that --help and mistakes answer at once
    from qlora_lightning.commands.fit import QLoRACLI

    with quiet_lightning():
        run = QLoRACLI(fit_options)
        data: Any = run.datamodule
        data.lenient = True  # bad rows are listed, and the others prepared
        data.setup()
        splits = [name for name in _VERBS if name in data.reports and options.split in (None, name)]
        if not splits:
            raise UserError(f"There are no rows to inspect: data.{options.split or 'train'} names no file.")
    console = terminal(record=page is not None)
    _print_report(data, splits, run.config["trainer"], options, console)
    faults = {data.faults[split]: _VERBS[split] for split in splits if split in data.faults}
    if not faults:
        verbs = dict.fromkeys(f"`{_VERBS[split]}`" for split in splits)
        console.print(Text(f"\n{' and '.join(verbs)} would start on these rows."))
    if page is not None:
        write_whole(page, console.export_html())
        say(f"\nPage: {page}")
    sys.stdout.flush()
    if faults:
        messages = [f"`{verb}` would not start. {fault}" for fault, verb in faults.items()]
        raise UserError("\n".join(messages), next(iter(faults)).key)
    return 0


def _print_report(
    data: Any, splits: Sequence[str], trainer: Mapping[str, Any], options: argparse.Namespace, console: Console
) -> None:
    """Print the whole report on splits of a data module that is set up."""
    from qlora_lightning.commands.plan import plan_epoch

    def heading(text: str) -> None:
        console.print()
        console.print(Text(text, "bold"))

    shown_split = splits[0]
    stops = " or ".join(f"{data.tokenizer.decode([token_id])} ({token_id})" for token_id in data.stop_ids)
    settings = {"stop token": stops, **{key: getattr(data, key) for key in ("max_length", "too_long", "train_on")}}
    console.print(Text(" · ".join(f"{key} {value}" for key, value in settings.items()), "dim"))
    heading("Rows")
    for split in splits:
        console.print(Text(data.reports[split].describe(skip_bad=data.on_bad_row == "skip")))
    heading("Tokens per sample")
    console.print(_length_table({split: data.samples[split] for split in splits}))
    for split in splits:
        sources = data.sample_sources[split]
        if len(sources) > 1:
            heading(f"Sources of {split}")
            console.print(_source_table(data.samples[split], sources))
    if "train" in splits:
        heading("An epoch of train")
        epoch = plan_epoch(data.plan_epochs(), trainer)
        size = count_of(data.batch_size, "row") if data.batch_size else f"up to {data.tokens_per_batch:,} tokens"
        per_device = "" if epoch.devices == 1 else f" on each of {epoch.devices} devices"
        batches = f"{count_of(epoch.batches, 'batch')} of {size}{per_device}"
        console.print(Text(f"{batches}; {count_of(epoch.tokens, 'token')}, no padding"))
        run_steps = "no end: set trainer.max_steps" if epoch.all_steps is None else f"{epoch.all_steps:,} in all"
        console.print(Text(f"{count_of(epoch.steps, 'optimizer step')}; {run_steps}"))
    heading(f"Rows of {shown_split} as the model sees them")
    console.print(_MARKS)
    samples = data.samples[shown_split]
    for title, tokens in _show_rows(samples, data.tokenizer, data.stop_ids, options.row, options.longest):
        console.print()
        console.print(title)
        console.print(tokens)


# ---- tables --------------------------------------------------------------------------------------------------------


def _source_table(samples: SampleSet, sources: Sequence[Source]) -> Table:
    total_weight = sum(source.weight or 0.0 for source in sources)
    rows = []
    for index, source in enumerate(sources):
        mask = samples.source == index
        n_tokens, n_labelled = int(samples.lengths[mask].sum()), int(samples.labelled_counts[mask].sum())
        row = [source.path, f"{len(np.unique(samples.row_ids[mask])):,}", f"{mask.sum():,}", f"{n_tokens:,}"]
        row.append(_share(n_labelled, n_tokens))
        rows.append(row + ([_share(source.weight or 0.0, total_weight)] if total_weight else []))
    headings = ["source", "rows left", "samples", "tokens", "labeled", *(["of an epoch"] if total_weight else [])]
    return make_table(headings, rows, box=False)


def _length_table(sample_sets: dict[str, SampleSet]) -> Table:
    rows = []
    for split, samples in sample_sets.items():
        for kind, counts in (("tokens", samples.lengths), ("labeled", samples.labelled_counts)):
            if counts.any():
                percentiles = np.percentile(counts, list(_PERCENTILES.values()), method="inverted_cdf")  # actual values
                rows.append([f"{split} {kind}", *(f"{int(count):,}" for count in percentiles)])
    return make_table(["", *_PERCENTILES], rows, box=False)


def _share(part: float, total: float) -> str:
    return f"{part / total:.1%}" if total else "–"


# ---- rows token by token ---------------------------------------------------------------------------------------------


def _show_rows(
    samples: SampleSet, tokenizer: Any, stop_ids: Collection[int], row_names: Sequence[str], longest: bool
) -> Iterator[tuple[Text, Text]]:
    """Yield a title and the tokens of each requested row, or of both its answers; else of the first two."""
    indices: list[int] = []
    for name in row_names:
        file, _, line = name.rpartition(":")
        candidates = np.flatnonzero(samples.line == int(line)).tolist() if line.isdecimal() else []
        matches = [index for index in candidates if samples.where(index).endswith(f"{file}:{line}")]
        if not matches:
            raise UserError(f"--row {name}: no row of this split that is left begins there (N or FILE:N).")
        indices += matches
    if longest:
        indices.append(int(samples.lengths.argmax()))
    for index in indices or range(min(_DEFAULT_ROWS, len(samples))):
        start, end = samples.starts[index : index + 2].tolist()
        answers = [("", start, end)]
        if samples.chosen_length is not None:
            rejected_start = start + int(samples.chosen_length[index])
            answers = [("chosen: ", start, rejected_start), ("rejected: ", rejected_start, end)]
        elif samples.desirable is not None:
            answers = [("desirable: " if samples.desirable[index] else "undesirable: ", start, end)]
        for label, begin, stop in answers:
            token_ids, labelled = samples.ids[begin:stop].tolist(), samples.labelled[begin:stop].tolist()
            summary = f"  {label}{count_of(len(token_ids), 'token')}, {sum(labelled):,} labeled"
            tokens = _mark_tokens(token_ids, labelled, tokenizer, stop_ids)
            yield Text.assemble((samples.where(index), "bold"), summary), tokens


def _mark_tokens(token_ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any, stop_ids: Collection[int]) -> Text:
    """Return a sample as text: a mark between tokens, labeled ones in brackets, control tokens in colors."""
    special_ids, text = ControlTokens(tokenizer, stop_ids).known, Text()
    is_labelled = False
    for token, index in _decode(token_ids, labelled, tokenizer):
        mark = "│" if index else ""
        if labelled[index] != is_labelled:
            is_labelled = labelled[index]
            mark = "⟦" if is_labelled else "⟧"
        colour = "green" if is_labelled else ""
        if token_ids[index] in special_ids:
            colour = "bold magenta" if is_labelled else "magenta"
        text.append(mark, "dim").append(show_controls(token).replace("\n", "↵\n"), colour)
        text.append("■" if is_labelled and token_ids[index] in stop_ids else "")
    text.append("⟧" if is_labelled else "")
    text.rstrip()
    return text


def _decode(token_ids: Sequence[int], labelled: Sequence[bool], tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Yield the text of each token, or of the few that form one character, with the index of the first."""
    context_start = start = 0
    while start < len(token_ids):
        # decoded after the token before it, a token keeps the space that some decoders drop at the start of a text
        context = tokenizer.decode(list(token_ids[context_start:start])) if start else ""
        for end in range(start + 1, len(token_ids) + 1):
            text = tokenizer.decode(list(token_ids[context_start:end])).removeprefix(context)
            is_complete = not text.endswith(_UNFINISHED) or end in (len(token_ids), start + _MAX_CHARACTER_TOKENS)
            if is_complete or labelled[end] != labelled[start]:
                break
        yield text, start
        context_start, start = start, end
