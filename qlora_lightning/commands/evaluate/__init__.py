"""``qlora-lightning evaluate``: base against adapters on the same rows, by loss and by scored answers."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.commands.adapter_config import add_config
from qlora_lightning.commands.evaluate.options import Options, named_adapters
from qlora_lightning.commands.evaluate.targets import check_targets
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.commands.output import check_output, tables_beside
from qlora_lightning.evaluation.scores import check_scores
from qlora_lightning.support.errors import UserError

_DESCRIPTION = """Judge a base and one or several adapters on the same rows: loss, perplexity, token accuracy, and
greedy answers from the prompts alone, scored against the rows' own. With 95 % intervals and paired differences.

The config is the one that `fit` takes, and so are its options: --data.test rows.jsonl, --data.system "…". Without
--config it is that of the run folder around the adapter. Its section `evaluation:` and trainer.limit_val_batches hold
as during `fit`: the same rows are judged, and the first 100 (evaluation.rows) answered."""
_EPILOG = """examples:
  qlora-lightning evaluate --config runs/quickstart/config.yaml --rows 20
  qlora-lightning evaluate --adapter runs/quickstart/adapter --scores chrf
  qlora-lightning evaluate --config configs/quickstart.yaml --adapter a=runs/a/adapter --adapter b=runs/b/adapter
  qlora-lightning evaluate --config runs/quickstart/config.yaml --data.test more.jsonl --split test --out judged

Without --adapter it is the run folder's own. Nothing is written but what --out and --json name: --out makes
evaluation.json (all figures) and predictions.jsonl (a line per row, the hardest first) in a folder.

Scores: exact_match; json_valid and json_f1 (fields) of JSON; numeric_match (GSM8K's `#### 18`, else the last number);
rouge_l; chrf. Those that fit the expected answers are taken, unless --scores names some. stop_rate is the share of
answers that end by themselves. A row is an answer's last turn, answered from all turns before it."""


def main(argv: Sequence[str]) -> int:
    """Evaluate; return the exit code.

    Raises:
        UserError: A key, value, adapter or file is wrong.
    """
    own, rest = _parser().parse_known_args(argv)
    options = _checked(own, rest)
    if not (options.adapters or rest):
        raise UserError("What shall be judged? Name an adapter folder by --adapter DIR, or a config by --config FILE.")
    first = next(iter(options.adapters.values()), None)
    asked, rest = rest, add_config(first, rest)

    from qlora_lightning.commands.evaluate.run import evaluate  # here, so that --help and mistakes answer at once

    with tables_beside(options.json):
        if len(options.adapters) > 1 and rest != asked:
            print(f"Config, rows and limits are those of {first}, the first adapter; --config FILE names others.")
        evaluate(options, rest)
    return 0


def _parser() -> OptionParser:
    usage = "qlora-lightning evaluate [--config FILE] [--adapter [NAME=]DIR …] [options] [options of fit]"
    parser = OptionParser("evaluate", _DESCRIPTION, _EPILOG, usage)
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="adapter folder; may be given again")
    add("--split", choices=("val", "test"), default="val", help="rows of data.val (default) or data.test")
    add("--rows", type=int, metavar="N", help="only the first N rows, and answer all of them")
    add("--max-new-tokens", type=int, metavar="N", help="cut answers there (evaluation.max_new_tokens)")
    add("--batch-size", type=int, metavar="N", help="rows answered together, at most (evaluation.batch_size)")
    add("--scores", metavar="NAMES", help="auto, or names with commas between them (evaluation.scores)")
    add("--group-by", metavar="COLUMN", help="also a table by the values of a column of the rows")
    add("--show", type=int, metavar="N", help="print the N hardest rows (evaluation.samples)")
    add("--out", metavar="DIR", help="write evaluation.json and predictions.jsonl there")
    add("--force", action="store_true", help="overwrite them, and what --json names")
    add("--json", metavar="FILE", help="write evaluation.json's figures to this file")
    return parser


def _checked(own: argparse.Namespace, rest: Sequence[str]) -> Options:
    """Check what can be checked before a second is spent.

    Raises:
        UserError: A value cannot work, or would overwrite a file.
    """
    for name, least in (("rows", 1), ("max_new_tokens", 1), ("batch_size", 1), ("show", 0)):
        value = getattr(own, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: expected {least} or more.")
    if own.scores is not None:
        check_scores(own.scores)
    options = Options(
        adapters=named_adapters(own.adapter),
        split=own.split,
        rows=own.rows,
        max_new_tokens=own.max_new_tokens,
        batch_size=own.batch_size,
        scores=own.scores,
        group_by=own.group_by,
        show=own.show,
        out=None if own.out is None else Path(own.out),
        json=check_output("--json", own.json, own.force),
    )
    for folder in options.adapters.values():
        read_identity(folder)
    check_targets(options, own.force)
    return options
