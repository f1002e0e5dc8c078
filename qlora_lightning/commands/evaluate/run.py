"""Loads the base once, evaluates it and each adapter on the same rows, and reports."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
from rich.console import Console
from rich.markup import escape

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.callbacks import AdapterCheckpoint, Evaluation
from qlora_lightning.commands.config import refuse_moved_run
from qlora_lightning.commands.options import quiet_lightning, write_json
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.readers import Row
from qlora_lightning.evaluation.comparison import BASE, Judged, Part, compare, duel, hardest_first
from qlora_lightning.evaluation.judge import Answering, EvaluationRow, cut_rows, judge_rows, steps_bar
from qlora_lightning.evaluation.report import (
    EVALUATION_FILE,
    PREDICTIONS_FILE,
    describe_duel,
    differences_table,
    metrics_as_json,
    metrics_table,
    parts_table,
    prediction_lines,
    samples_table,
    show_row,
    summarize,
    write_lines,
)
from qlora_lightning.evaluation.scores import Judgement, describe_answered, describe_metric
from qlora_lightning.model.adapters.identity import data_differences
from qlora_lightning.model.adapters.lora import ADAPTER, without_adapters
from qlora_lightning.model.batch import join_places
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of

_ONE_DEVICE = (
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
)
_PROMPT_SETTINGS = {  # what makes prompts, and the settings that it comes from
    "tokenizer": "data.tokenizer",
    "chat template": "data.chat_template and data.template_options",
    "system prompt": "data.system",
}


def evaluate(options: argparse.Namespace, adapters: Mapping[str, Path], arguments: Sequence[str]) -> None:
    """Evaluate, print and write.

    Args:
        options: the command's own; the config's section ``evaluation`` has those that were left out.
        adapters: folders by name; none: that of the run folder.
        arguments: options of ``fit``.

    Raises:
        UserError: a key, value, adapter or row is wrong.
    """
    with quiet_lightning():
        run = QLoRACLI([*arguments, *_ONE_DEVICE])
        trainer: Any = run.trainer
        module: Any = run.model
        data: Any = run.datamodule
        adapters = adapters or _find_adapter_of_run(trainer.default_root_dir, run.configs)
        section = next(each for each in callbacks_of(trainer) if isinstance(each, Evaluation))
        answered = section.rows if options.rows is None else options.rows
        options.show = section.samples if options.show is None else options.show

        module.trainer = data.trainer = trainer
        data.setup("validate" if options.split == "val" else "test")
        limit = trainer.limit_val_batches if options.split == "val" else trainer.limit_test_batches
        rows = _read_rows(data, options, limit)
        own_report = data.reports.get(options.split)
        if own_report is not None and own_report.shortened:
            say(f"{own_report.describe()}\n  what shortens rows: data.max_length, data.too_long")
        for name, folder in adapters.items():
            _warn_of_other_prompts(name, folder, getattr(data, "identity", {}))

        asked = [row for row in rows[:answered] if row.prompt is not None]
        answering = None
        if asked:
            answering = Answering.of(
                asked,
                data.tokenizer,
                data.stop_ids,
                options.scores or section.scores,
                options.max_new_tokens or section.max_new_tokens,
                options.batch_size or section.batch_size,
            )
        peft_names = _load(module, adapters)
        steps = (1 + len(adapters)) * (len(rows) + (min(answered, len(rows)) if answering else 0))
        judged: dict[str, list[Judgement]] = {}
        with steps_bar(f"base and {', '.join(adapters)}", steps) as watch:
            with without_adapters(module.model):
                judged[BASE] = judge_rows(module, rows, answering, answered, watch)
            for name, peft_name in zip(adapters, peft_names, strict=True):
                module.model.set_adapter(peft_name)
                judged[name] = judge_rows(module, rows, answering, answered, watch)
        _report(rows, judged, answering, _name_sources(data, options.split), adapters, options)


def _find_adapter_of_run(run_folder: str, configs: Mapping[str, Any]) -> dict[str, Path]:
    refuse_moved_run(configs, run_folder)
    folder = AdapterCheckpoint.adapter_folder(run_folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"There is no adapter in {folder}: pass --adapter DIR, or run `fit` first.")
    return {"adapter": folder}


def _load(module: Any, adapters: Mapping[str, Path]) -> list[str]:
    """Load the base with the first adapter and put the others beside it; return PEFT's names of them."""
    first, *others = adapters.values()
    module.adapter = str(first)
    if not module.overrides("build_model"):  # another one may ask for them
        module.adapter_options = {}  # rank and targets are those of the folders, whatever the config trains
    module.configure_model()
    module.to(module.trainer.strategy.root_device)
    names = [ADAPTER]
    for number, folder in enumerate(others, start=1):  # a user's name may hold what PEFT does not take
        names.append(f"adapter_{number}")
        module.add_adapter(names[-1], folder)
    return names


# ---- rows ------------------------------------------------------------------------------------------------------------


def _read_rows(data: Any, options: argparse.Namespace, limit: float) -> list[EvaluationRow]:
    """Return the first rows of a split, in order, each with its place and its group.

    Args:
        data: the data module, set up.
        options: ``--split``, ``--group-by``, and ``--rows``; without it the rows are those of the batches in ``limit``.
        limit: the Trainer's: a number of batches, or their share.
    """
    split, most = options.split, options.rows
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    batches = None
    if most is None and (isinstance(limit, int) or limit < 1):
        batches = limit if isinstance(limit, int) else int(len(loader) * limit)
    rows: list[EvaluationRow] = []
    for batch in itertools.islice(loader, batches):
        rows += cut_rows(batch)
        if most is not None and len(rows) >= most:
            break
    rows = rows[:most]
    if not rows:
        why = "no row has a labelled token" if batches is None else f"trainer.limit_{split}_batches is {limit:g}"
        raise UserError(f"There are no {split} rows to evaluate: {why}.")
    samples = data.samples.get(split)
    places = {} if samples is None else {int(row_id): samples.where(n) for n, row_id in enumerate(samples.row_ids)}
    groups = {} if options.group_by is None else _read_groups(data, split, options.group_by)
    for row in rows:
        row.place = places.get(row.number, f"row {row.number}")
        row.group = None if options.group_by is None else groups.get(row.number, "(none)")
    return rows


def _read_groups(data: Any, split: str, column: str) -> dict[int, str]:
    found: dict[int, str] = {}
    rows: Iterable[Row | BadRow | dict[str, Any]] = data.load_rows(_read_from(data, split))
    for number, row in enumerate(rows):
        values = row.values if isinstance(row, Row) else row if isinstance(row, dict) else {}
        if values.get(column) is not None:
            found[number] = str(values[column])
    if not found:
        raise UserError(f"--group-by {column}: no row of {split} has that column.")
    return found


def _name_sources(data: Any, split: str) -> list[str]:
    """Return the sources of a split as the user wrote them, in the order of their numbers."""
    return [source.path for source in data.sources(_read_from(data, split))]


def _read_from(data: Any, split: str) -> str:
    """Return the split whose files hold the rows: validation rows may be held out of the training rows."""
    return "train" if split == "val" and data.val_fraction is not None else split


def _warn_of_other_prompts(name: str, folder: Path, own: Mapping[str, Any]) -> None:
    """Report settings that make other prompts than an adapter's training had; ``own`` is the data's identity."""
    stored = read_identity(folder).get("data") or {}
    differs = [what for what in _PROMPT_SETTINGS if what.replace(" ", "_") in data_differences(stored, own)]
    if "settings" in stored and stored["settings"].get("system") != (own.get("settings") or {}).get("system"):
        differs.append("system prompt")
    if differs:
        keys = " and ".join(_PROMPT_SETTINGS[what] for what in differs)
        rich.print(
            f"[yellow]Warning:[/yellow] {escape(name)} was trained with another {' and another '.join(differs)}, so "
            f"its prompts here are new to it: set {keys} as in its training."
        )


# ---- results ---------------------------------------------------------------------------------------------------------


def _report(
    rows: Sequence[EvaluationRow],
    judged: Judged,
    answering: Answering | None,
    sources: Sequence[str],
    adapters: Mapping[str, Path],
    options: argparse.Namespace,
) -> None:
    """Print the tables, and write the files that were asked for."""
    scores = answering.scores if answering else []
    score = next(iter(scores), None)
    measured = compare(judged, scores)
    duels = {name: duel(judged[BASE], judged[name], score) for name in adapters}
    hardest = hardest_first(judged[next(iter(adapters))], score)
    by_source = _compare_parts(
        rows, judged, scores, lambda row: sources[row.source] if row.source < len(sources) else str(row.source)
    )
    by_group = _compare_parts(rows, judged, scores, lambda row: row.group or "") if options.group_by else {}

    console = Console(highlight=False)
    answered = {place for place, each in enumerate(judged[BASE]) if each.answer is not None}
    some = describe_answered(len(answered), len(rows))
    console.print(metrics_table(measured, f"{len(rows):,} rows of {options.split}{some}, with 95 % intervals"))
    if len(adapters) > 1:
        console.print(differences_table(measured))
    if answering is not None:
        for note in (answering.mixture, _describe_cut(judged, answering.max_new_tokens)):
            if note is not None:
                console.print(note, markup=False)
    for name, found in duels.items():
        console.print(describe_duel(found, name if len(adapters) > 1 else "the adapter"), markup=False)
        for which, numbers in (("better", found.wins), ("worse", found.losses)):
            if numbers:
                console.print(f"  {which}: {join_places([rows[number].place for number in numbers])}", markup=False)
    shown = ["loss", *scores[:1]]
    if len(by_source) > 1:
        console.print(parts_table(by_source, "By data set", shown))
    if by_group:
        console.print(parts_table(by_group, f"By {options.group_by}", shown))
    if answering is not None and score is not None:
        name = next(iter(adapters))
        wrong = [number for number in hardest if number in answered and judged[name][number].scores[score] < 1]
        for number in wrong[: options.show]:
            cells = show_row(rows[number], judged, number, answering)
            console.print(samples_table(cells, f"Hard for {name}: {rows[number].place}"))
        if not wrong:
            console.print(f"By {describe_metric(score)}, {name} has all {len(answered):,} answers right.", markup=False)

    summary = summarize(rows, judged, measured, answering, duels, samples=options.show)
    summary |= {"split": options.split, "adapters": {name: str(folder) for name, folder in adapters.items()}}
    summary |= {"hardest": [rows[number].number for number in hardest]}
    summary |= {"sources": _parts_as_json(by_source), "groups": _parts_as_json(by_group)}
    if options.json is not None:
        write_json(options.json, summary)
    if options.out is not None:
        figures, predictions = options.out / EVALUATION_FILE, options.out / PREDICTIONS_FILE
        write_lines(prediction_lines(rows, judged, hardest, answering, sources), predictions)
        write_json(figures, summary)
        console.print(f"Written: {figures}, {predictions}", markup=False, soft_wrap=True)


def _describe_cut(judged: Judged, limit: int) -> str | None:
    """Describe how many answers of each side had not stopped when they were cut; None if all had."""
    parts = []
    for name, judgements in judged.items():
        stopped = [each.stopped for each in judgements if each.answer is not None]
        if not all(stopped):
            parts.append(f"{stopped.count(False):,} of {len(stopped):,} of {'the base' if name == BASE else name}")
    if not parts:
        return None
    return f"Answers are cut at {limit:,} tokens (--max-new-tokens): {', '.join(parts)} had not stopped by then."


def _compare_parts(
    rows: Sequence[EvaluationRow], judged: Judged, scores: Sequence[str], name_of: Callable[[EvaluationRow], str]
) -> dict[str, Part]:
    parts: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        parts.setdefault(name_of(row), []).append(number)
    found = {}
    for name, numbers in parts.items():
        own = {side: [judgements[number] for number in numbers] for side, judgements in judged.items()}
        answered = sum(each.answer is not None for each in own[BASE])
        found[name] = Part(len(numbers), answered, compare(own, scores))
    return found


def _parts_as_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {
        name: {"rows": part.rows, "answered_rows": part.answered, "metrics": metrics_as_json(part.measured)}
        for name, part in parts.items()
    }
