"""Loads the base once, evaluates it and each adapter on the same rows, and reports."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_lightning.callbacks import Evaluation
from qlora_lightning.callbacks.run_folder import warn_of_other_data
from qlora_lightning.commands.evaluate.server import SERVED, ServedAnswer, Server, add_served, make_requests
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.evaluation import BASE
from qlora_lightning.evaluation.comparison import Comparison
from qlora_lightning.evaluation.row_results import (
    Answer,
    AnswerSettings,
    EvaluationRow,
    OnAnswers,
    evaluate_sides,
    keep_prompts,
    take_batches,
    unpack_rows,
)
from qlora_lightning.model.adapters.inject import ADAPTER
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import (
    ADAPTER_FOLDER,
    EVALUATION,
    PREDICTIONS,
    UNFINISHED_PREDICTIONS,
    append_json_lines,
    format_json_lines,
    set_aside,
    write_whole,
)
from qlora_lightning.support.trainer import find_callback

_ONE_DEVICE = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
_QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false")


def evaluate(
    adapters: Mapping[str, Path],
    arguments: Sequence[str],
    *,
    split: str = "val",
    n_rows: int | None = None,
    out: Path | None = None,
    server: Server | None = None,
) -> dict[str, Any]:
    """Evaluate base and adapters on the same rows, and print the comparison; return all figures.

    Args:
        adapters: Folders by name; if empty, that of the run folder.
        arguments: Options of ``fit``, which choose base, data, and how rows are answered.
        split: ``val`` or ``test``.
        n_rows: Only the first so many rows.
        out: Folder for ``evaluation.json`` and ``predictions.jsonl``.
        server: One that answers too, and gets a verdict.
    """
    with quiet_lightning():
        run = QLoRACLI([*arguments, *_ONE_DEVICE, *_QUIET], "validate")
        if run.config["ckpt_path"] is not None or run.names_adapter:
            raise UserError("evaluate takes adapter folders, by --adapter DIR, not --ckpt_path or --model.adapter.")
        trainer: Any = run.trainer
        module: Any = run.model
        data: Any = run.datamodule
        adapters = adapters or {"adapter": Path(trainer.default_root_dir) / ADAPTER_FOLDER}
        evaluation: Any = find_callback(trainer, Evaluation)
        trainer.datamodule, module.trainer, data.trainer = data, trainer, trainer
        data.setup("validate" if split == "val" else "test")
        evaluation.read_general(data)
        batches, rows = _select_rows(trainer, data, split, n_rows)
        report = data.reports.get(split)
        if report is not None and (report.shortened or report.overlap):
            say(report.describe())
        if data.files["train"] is not None and "train" not in data.samples:
            say("The rows are not compared with those of the training, which were not read: missing or remote.")
        for name, folder in adapters.items():
            warn_of_other_data(name, folder, data)
        answered_rows = keep_prompts(rows, evaluation.rows)
        requests = [] if server is None else make_requests(data, split, answered_rows)  # takes prompts away
        settings = evaluation.choose_settings(trainer, answered_rows)
        unfinished_file = out and out / UNFINISHED_PREDICTIONS
        if unfinished_file:
            set_aside(unfinished_file)
        on_answers = partial(_append_answers, unfinished_file)
        # before the base: it may fail
        served = [] if server is None else _ask_server(server, requests, answered_rows, settings, on_answers)
        peft_names = dict(zip(adapters, _load(module, adapters), strict=True))
        results = evaluate_sides(module, batches, answered_rows, settings, peft_names, on_answers=on_answers)
        results = {side: side_results[: len(rows)] for side, side_results in results.items()}  # --rows may cut a batch
        general = evaluation.evaluate_general(module, peft_names, show=True)
        verdict = None
        if server is not None and settings is not None:
            verdict = add_served(served, answered_rows, settings, results)
            if general is not None:
                general[SERVED] = [(0.0, 0.0)] * len(general[BASE])
        comparison = Comparison(rows, results, settings, general)
        return _report(comparison, adapters, split, out, evaluation.samples, verdict)


def _load(module: Any, adapters: Mapping[str, Path]) -> list[str]:
    """Load the base with the first adapter and add the others; return PEFT's names of all."""
    first_folder, *other_folders = adapters.values()
    module.adapter = str(first_folder)
    if not module.overrides("build_model"):  # an override may need them
        module.adapter_options = {}  # rank and targets are those of the folders, whatever the config trains
    module.configure_model()
    module.to(module.trainer.strategy.root_device)
    peft_names = [ADAPTER]
    for number, folder in enumerate(other_folders, start=1):  # PEFT does not take every name of a user
        peft_names.append(f"adapter_{number}")
        module.add_adapter(peft_names[-1], folder)
    return peft_names


def _ask_server(
    server: Server,
    requests: Sequence[Mapping[str, Any]],
    rows: Sequence[EvaluationRow],
    settings: AnswerSettings | None,
    on_answers: OnAnswers,
) -> list[ServedAnswer]:
    """Return the server's answers to the rows that have a prompt, in their order."""
    if settings is None:
        raise UserError("--server: no row has a prompt that it could answer.")
    requests = [{**request, "max_tokens": settings.max_new_tokens} for request in requests]
    prompted_rows = [row for row in rows if row.prompt is not None]
    answers = server.answer(requests, lambda n, answer: on_answers(SERVED, [prompted_rows[n]], [answer[0]]))
    # a server may answer more than it was asked for, and scores of a long text take minutes
    longest = settings.max_new_tokens * max(map(len, settings.tokenizer.get_vocab()))
    return [(answer._replace(text=answer.text[:longest]), prompt_tokens) for answer, prompt_tokens in answers]


# ---- rows ------------------------------------------------------------------------------------------------------------


def _select_rows(trainer: Any, data: Any, split: str, n_rows: int | None) -> tuple[list[Any], list[EvaluationRow]]:
    """Return batches of a split and their rows, each with its place and source.

    These are the first ``n_rows``, else those within the Trainer's limit of batches.
    """
    batches, rows = [], list[EvaluationRow]()
    loader, limit = getattr(data, f"{split}_dataloader")(), getattr(trainer, f"limit_{split}_batches")
    for batch in take_batches(loader, limit) if n_rows is None else loader:
        batches.append(batch)
        rows += unpack_rows(batch)
        if n_rows is not None and len(rows) >= n_rows:
            break
    rows = rows[:n_rows]
    if not rows:
        raise UserError(
            f"There are no {split} rows to evaluate: none has a labelled token, or trainer.limit_{split}_batches is 0."
        )
    samples, sources = data.samples.get(split), data.sample_sources.get(split)
    places = {} if samples is None else {int(row_id): samples.where(n) for n, row_id in enumerate(samples.row_ids)}
    for row in rows:
        row.place = places.get(row.number, f"row {row.number}")
        row.source = sources[int(row.source)].path if sources else row.source
    return batches, rows


def _append_answers(file: Path | None, side: str, rows: Sequence[EvaluationRow], answers: Sequence[Answer]) -> None:
    """Append answers, as they come, to the file of the results, if there is one."""
    if file is not None:
        pairs = zip(rows, answers, strict=True)
        lines = [{"row": row.number, "place": row.place, "side": side, **answer._asdict()} for row, answer in pairs]
        append_json_lines(file, lines)


# ---- results ---------------------------------------------------------------------------------------------------------


def _report(
    comparison: Comparison,
    adapters: Mapping[str, Path],
    split: str,
    out: Path | None,
    samples: int,
    verdict: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Print the tables, write the files that were asked for, and return all figures."""
    rows = "validation rows" if split == "val" else "test rows"
    comparison.print(rows)
    sources = comparison.by_source()
    if len(sources) > 1:
        for name, source in sources.items():
            source.print_metrics(f"{rows} of {name}")
    hardest = comparison.hardest_first()
    wrong = [index for index in hardest if comparison.is_wrong(index)][:samples]
    if wrong:
        say(f"The hardest rows for {comparison.adapters[0]}:")
    comparison.print_rows(wrong)
    if verdict is not None:
        say(verdict["sentence"])
    summary = comparison.summary(samples)
    summary |= {
        "split": split,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "hardest": [comparison.rows[index].number for index in hardest],
        "sources": {name: source.figures() for name, source in sources.items()},
        **({} if verdict is None else {SERVED: verdict}),
    }
    if out is not None:
        figures, predictions = out / EVALUATION, out / PREDICTIONS
        write_whole(predictions, format_json_lines(comparison.predictions(hardest)))
        write_whole(figures, summary)
        set_aside(out / UNFINISHED_PREDICTIONS).unlink(missing_ok=True)
        say(f"Written: {figures}, {predictions}")
    return summary
