"""``qlora-lightning evaluate``: base against adapters on the same rows, by loss and by scored answers."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveFloat, PositiveInt

from qlora_lightning.commands.adapter import add_config, name_adapters
from qlora_lightning.commands.config import find_configs
from qlora_lightning.commands.options import (
    OptionParser,
    add_json_option,
    check_output,
    expand_path,
    json_output,
    quiet_lightning,
)
from qlora_lightning.evaluation import BASE, SERVED
from qlora_lightning.support import files
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    from qlora_lightning.evaluation.comparison import Comparison
    from qlora_lightning.evaluation.row_results import Answer, EvaluationRow

_ONE_DEVICE = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
_QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false")
_DESCRIPTION = """Compare a base and one or more adapters on the same rows.

The report has loss, perplexity, token accuracy, and scores of greedy answers, with 95 % intervals and paired
differences. Answers are generated from the prompts alone.

Pass the same config and options as to `fit`: --data.test rows.jsonl, --data.system "…". Without --config, the config of
the run folder around the adapter is used. `evaluation:` and trainer.limit_val_batches apply as during `fit`: the same
rows are evaluated, and answers are generated for 100 of them (evaluation.rows), evenly spaced."""
_EPILOG = """examples:
  qlora-lightning evaluate --config runs/quickstart/config.yaml --rows 20
  qlora-lightning evaluate --adapter runs/quickstart/adapter --scores chrf
  qlora-lightning evaluate --config configs/quickstart.yaml --adapter a=runs/a/adapter --adapter b=runs/b/adapter
  qlora-lightning evaluate --config runs/quickstart/config.yaml --data.test more.jsonl --out evaluated

With --server URL, an inference server with OpenAI's chat completions API generates for the same rows. The exit code is
0 if it answers like the adapter, and 1 if it answers like the base or like neither. If it needs a key, set
OPENAI_API_KEY.

Without --adapter, the adapter of the run folder is evaluated. --out DIR writes evaluation.json (all figures) and
predictions.jsonl (a line per row, the hardest first).

Scores: exact_match; json_valid and json_f1 (fields) for JSON; numeric_match (GSM8K's `#### 18`, else the last number);
rouge_l; chrf. By default, those that fit the expected answers are used. stop_rate is the share of answers that end by
themselves. Of each row, the last answer is generated, from all turns before it."""


def main(argv: Sequence[str]) -> int:
    """Evaluate; return the exit code."""
    parser = OptionParser("evaluate", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="adapter folder; may be repeated")
    add("--split", choices=("val", "test"), help="use data.val or data.test (default: val; test with --data.test)")
    add("--rows", type=PositiveInt, metavar="N", help="use only N rows, evenly spaced, and generate for all of them")
    add("--out", type=expand_path, metavar="DIR", help="write evaluation.json and predictions.jsonl to this folder")
    add("--max-new-tokens", dest="evaluation.max_new_tokens", metavar="N", help="maximum length of an answer")
    add("--scores", dest="evaluation.scores", metavar="NAMES", help="auto, or names separated by commas")
    add("--show", dest="evaluation.samples", metavar="N", help="print the N hardest rows")
    forgetting_help = "rows unrelated to the task, to measure what the adapter forgot"
    add("--forgetting", dest="evaluation.forgetting", metavar="FILE", help=forgetting_help)
    add("--server", metavar="URL", help="also evaluate a server, such as http://localhost:8000/v1")
    add("--served-name", metavar="NAME", help="name of the model on the server (default: the only one)")
    add("--timeout", type=PositiveFloat, default=600.0, metavar="SECONDS", help="wait for the server (default: 600)")
    add("--parallel", type=PositiveInt, default=8, metavar="N", help="concurrent requests to the server (default: 8)")
    add_json_option(parser)
    options, fit_options = parser.parse_known_args(argv)
    names_test_rows = any(option.partition("=")[0] == "--data.test" for option in fit_options)
    options.split = options.split or ("test" if names_test_rows else "val")
    if not options.adapter and not fit_options:
        raise UserError("Nothing to evaluate: pass --adapter DIR, or --config FILE of a run.", "adapter")
    adapters = name_adapters(options.adapter)
    if len(adapters) == 1 and "=" not in options.adapter[0]:
        adapters = {"adapter": next(iter(adapters.values()))}
    if options.server and len(adapters) > 1:
        raise UserError("--server is compared with one adapter: pass one --adapter.", "adapter")
    first_folder = next(iter(adapters.values()), None)
    arguments = add_config(first_folder, fit_options)
    for key, value in vars(options).items():  # --scores is --evaluation.scores, and so on
        if key.startswith("evaluation.") and value is not None:
            arguments += [f"--{key}", value]
    if options.rows is not None:
        arguments += ["--evaluation.rows", str(options.rows)]
    if options.out and options.out.is_file():
        raise UserError(f"--out {options.out} is a file: name a folder.")
    for name in (files.EVALUATION, files.PREDICTIONS) if options.out else ():
        check_output("--out", options.out / name, options.force)
    with json_output(options) as figures:
        if len(adapters) > 1 and not find_configs(fit_options):
            say(f"Config, rows and limits are those of {first_folder}, the first adapter; --config FILE names others.")
        figures |= _evaluate(adapters, arguments, options)
        return int(SERVED in figures and figures[SERVED]["match"] != "adapter")


def _evaluate(adapters: Mapping[str, Path], arguments: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate base and adapters, by default the run folder's own, on the same rows; print and return all figures."""
    from qlora_lightning.callbacks import Evaluation
    from qlora_lightning.callbacks.run_folder import warn_of_other_data
    from qlora_lightning.commands.evaluate_server import Server, make_requests, score_served
    from qlora_lightning.commands.fit import QLoRACLI
    from qlora_lightning.evaluation.comparison import Comparison
    from qlora_lightning.evaluation.row_results import evaluate_sides, keep_prompts
    from qlora_lightning.support.trainer import find_callback

    server = None
    if options.server is not None:
        server = Server(options.server, options.served_name, options.timeout, options.parallel)
    with quiet_lightning():
        run = QLoRACLI([*arguments, *_ONE_DEVICE, *_QUIET], "validate")
        if run.config["ckpt_path"] is not None or run.names_adapter:
            raise UserError(
                "evaluate takes adapter folders, by --adapter DIR, not --ckpt_path or --model.adapter.", "adapter"
            )
        trainer: Any = run.trainer
        module: Any = run.model
        data: Any = run.datamodule
        adapters = adapters or {"adapter": Path(trainer.default_root_dir) / files.ADAPTER_FOLDER}
        evaluation: Any = find_callback(trainer, Evaluation)
        trainer.datamodule, module.trainer, data.trainer = data, trainer, trainer
        data.setup("validate" if options.split == "val" else "test")
        evaluation.read_forgetting(data)
        report = data.reports.get(options.split)
        if report is not None and (report.shortened or report.overlap):
            say(report.describe())
        if data.files["train"] is not None and "train" not in data.samples:
            say("The rows are not compared with those of the training, which were not read: missing or remote.")
        for name, folder in adapters.items():
            warn_of_other_data(name, folder, data)
        batches, rows = _select_rows(trainer, data, options.split, options.rows)
        answered_rows = keep_prompts(rows, evaluation.rows)
        requests = {} if server is None else make_requests(data, options.split, answered_rows)  # takes prompts away
        settings = evaluation.choose_settings(trainer, answered_rows)
        if options.out:
            files.set_aside(options.out / files.UNFINISHED_PREDICTIONS)

        def on_answers(side: str, answered: Sequence[EvaluationRow], answers: Sequence[Answer]) -> None:
            if options.out:  # as they come: a kill leaves them
                pairs = zip(answered, answers, strict=True)
                lines = [{"row": row.number, "place": row.place, "side": side, **each._asdict()} for row, each in pairs]
                files.append_json_lines(options.out / files.UNFINISHED_PREDICTIONS, lines)

        served = {}
        if server is not None:  # before the base is loaded: it may fail
            if settings is None:
                raise UserError("--server: no row has a prompt that it could answer.", "server")
            served = asyncio.run(server.answer(requests, answered_rows, settings.max_new_tokens, on_answers))
        peft_names = dict(zip(adapters, _load(module, adapters), strict=True))
        results = evaluate_sides(module, batches, answered_rows, settings, peft_names, on_answers=on_answers)
        forgetting = evaluation.evaluate_forgetting(module, peft_names, show=True)
        match = None
        if server is not None and settings is not None:
            match = score_served(served, answered_rows, settings, results)
            if forgetting is not None:
                forgetting[SERVED] = [(0.0, 0.0)] * len(forgetting[BASE])
        comparison = Comparison(rows, results, settings, forgetting)
        return _report(comparison, adapters, options, evaluation.samples, match)


def _load(module: Any, adapters: Mapping[str, Path]) -> list[str]:
    """Load the base with the first adapter and add the others; return PEFT's names of all."""
    from qlora_lightning.model.adapters.inject import ADAPTER
    from qlora_lightning.model.self_check import check_device

    first_folder, *other_folders = adapters.values()
    module.adapter = str(first_folder)
    if not module.overrides("build_model"):  # an override may need them
        module.adapter_options = {}  # rank and targets are those of the folders, whatever the config trains
    module.configure_model()
    module.to(module.trainer.strategy.root_device)
    check_device(module, module.trainer)
    peft_names = [ADAPTER]
    for number, folder in enumerate(other_folders, start=1):  # PEFT does not take every name of a user
        peft_names.append(f"adapter_{number}")
        module.add_adapter(peft_names[-1], folder)
    return peft_names


# ---- rows ------------------------------------------------------------------------------------------------------------


def _select_rows(trainer: Any, data: Any, split: str, n_rows: int | None) -> tuple[list[Any], list[EvaluationRow]]:
    """Return batches of a split and their rows, within ``n_rows`` or the Trainer's limit."""
    from qlora_lightning.evaluation.row_results import spread, take_batches, unpack_rows

    samples, limit = data.samples[split], getattr(trainer, f"limit_{split}_batches")
    if n_rows is not None:
        data.samples[split] = samples = samples.take(spread(samples.labelled_counts.nonzero()[0], n_rows))
        limit = 1.0
    batches = list(take_batches(getattr(data, f"{split}_dataloader")(), limit))
    rows = [row for batch in batches for row in unpack_rows(batch)]
    if not rows:
        raise UserError(
            f"There are no {split} rows to evaluate: none has a labeled token, or trainer.limit_{split}_batches is 0."
        )
    sources = data.sample_sources.get(split)
    places = {int(row_id): samples.where(n) for n, row_id in enumerate(samples.row_ids)}
    for row in rows:
        row.place = places.get(row.number, f"row {row.number}")
        row.source = sources[int(row.source)].path if sources else row.source
    return batches, rows


# ---- results ---------------------------------------------------------------------------------------------------------


def _report(
    comparison: Comparison,
    adapters: Mapping[str, Path],
    options: argparse.Namespace,
    samples: int,
    match: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Print the tables, write the files that were asked for, and return all figures."""
    noun, out = "validation row" if options.split == "val" else "test row", options.out
    comparison.print(noun)
    sources = comparison.by_source()
    if len(sources) > 1:
        for name, source in sources.items():
            source.print_metrics(noun, name)
    hardest = comparison.hardest_first()
    wrong = [index for index in hardest if comparison.is_wrong(index)][:samples]
    if wrong:
        say(f"The hardest rows for {comparison.adapters[0]}:")
    comparison.print_rows(wrong)
    if match is not None:
        say(match["sentence"])
    summary = comparison.summary(samples)
    summary |= {
        "split": options.split,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "hardest": [comparison.rows[index].number for index in hardest],
        "sources": {name: source.figures() for name, source in sources.items()},
        **({} if match is None else {SERVED: match}),
    }
    if out is not None:
        figures, predictions = out / files.EVALUATION, out / files.PREDICTIONS
        files.write_whole(predictions, files.format_json_lines(comparison.predictions(hardest)))
        files.write_whole(figures, summary)
        files.set_aside(out / files.UNFINISHED_PREDICTIONS).unlink(missing_ok=True)
        say(f"Written: {figures}, {predictions}")
    return summary
