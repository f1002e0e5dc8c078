"""``qlora-lightning evaluate``: base against adapters on the same rows, by loss and by scored answers."""

from collections.abc import Sequence

from jsonargparse.typing import PositiveFloat, PositiveInt

from qlora_lightning.commands.adapter_config import add_config, name_adapters
from qlora_lightning.commands.config import find_configs
from qlora_lightning.commands.options import OptionParser, add_json_option, check_output, expand_path, json_output
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import EVALUATION, PREDICTIONS

_DESCRIPTION = """Evaluate a base and one or several adapters on the same rows: loss, perplexity, token accuracy, and
greedy answers from the prompts alone, scored against the rows' own. With 95 % intervals and paired differences.

The config is the one that `fit` takes, and so are its options: --data.test rows.jsonl, --data.system "…". Without
--config it is that of the run folder around the adapter. Its section `evaluation:` and trainer.limit_val_batches apply
as during `fit`: the same rows are evaluated, and 100 of them (evaluation.rows), evenly spaced, answered."""
_EPILOG = """examples:
  qlora-lightning evaluate --config runs/quickstart/config.yaml --rows 20
  qlora-lightning evaluate --adapter runs/quickstart/adapter --scores chrf
  qlora-lightning evaluate --config configs/quickstart.yaml --adapter a=runs/a/adapter --adapter b=runs/b/adapter
  qlora-lightning evaluate --config runs/quickstart/config.yaml --data.test more.jsonl --split test --out evaluated

With --server URL an inference server that speaks OpenAI's chat completions answers the same rows: as the adapter (exit
code 0), as the base, or as neither (exit code 1). A key, if it needs one, is taken from OPENAI_API_KEY.

Without --adapter it is the run folder's own. --out writes evaluation.json (all figures) and predictions.jsonl (a line
per row, the hardest first) into a folder.

Scores: exact_match; json_valid and json_f1 (fields) of JSON; numeric_match (GSM8K's `#### 18`, else the last number);
rouge_l; chrf. Those that fit the expected answers are taken, unless --scores names some. stop_rate is the share of
answers that end by themselves. A row is an answer's last turn, answered from all turns before it."""


def main(argv: Sequence[str]) -> int:
    """Evaluate; return the exit code."""
    parser = OptionParser("evaluate", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="adapter folder; may be repeated")
    add("--split", choices=("val", "test"), default="val", help="rows of data.val (default) or data.test")
    add("--rows", type=PositiveInt, metavar="N", help="only the first N rows, and answer all of them")
    add("--out", type=expand_path, metavar="DIR", help="write evaluation.json and predictions.jsonl there")
    add("--max-new-tokens", dest="evaluation.max_new_tokens", metavar="N", help="length at which answers are cut")
    add("--scores", dest="evaluation.scores", metavar="NAMES", help="auto, or names with commas between them")
    add("--show", dest="evaluation.samples", metavar="N", help="print the N hardest rows")
    add("--general", dest="evaluation.general", metavar="FILE", help="other rows, whose loss tells what was forgotten")
    add("--server", metavar="URL", help="let a server answer too: http://localhost:8000/v1")
    add("--served-name", metavar="NAME", help="name of the model there (default: the only one)")
    add("--timeout", type=PositiveFloat, default=600.0, metavar="SECONDS", help="for an answer of the server (600)")
    add("--parallel", type=PositiveInt, default=8, metavar="N", help="requests at a time (8)")
    add_json_option(parser)
    options, fit_options = parser.parse_known_args(argv)
    adapters = name_adapters(options.adapter)
    if len(adapters) == 1 and "=" not in options.adapter[0]:
        adapters = {"adapter": next(iter(adapters.values()))}
    if options.server and len(adapters) > 1:
        raise UserError("--server is compared with one adapter: pass one --adapter.")
    first_folder = next(iter(adapters.values()), None)
    arguments = add_config(first_folder, fit_options)
    for key, value in vars(options).items():  # --scores is --evaluation.scores, and so on
        if key.startswith("evaluation.") and value is not None:
            arguments += [f"--{key}", value]
    if options.rows is not None:
        arguments += ["--evaluation.rows", str(options.rows)]
    if options.out and options.out.is_file():
        raise UserError(f"--out {options.out} is a file: name a folder.")
    for name in (EVALUATION, PREDICTIONS) if options.out else ():
        check_output("--out", options.out / name, options.force)
    with json_output(options) as figures:
        # here, so that --help and mistakes answer at once
        from qlora_lightning.commands.evaluate.adapters import evaluate
        from qlora_lightning.commands.evaluate.server import SERVED, Server

        if len(adapters) > 1 and not find_configs(fit_options):
            say(f"Config, rows and limits are those of {first_folder}, the first adapter; --config FILE names others.")
        server = None
        if options.server is not None:
            server = Server(options.server, options.served_name, options.timeout, options.parallel)
        figures |= evaluate(
            adapters, arguments, split=options.split, n_rows=options.rows, out=options.out, server=server
        )
        return int(SERVED in figures and figures[SERVED]["verdict"] != "adapter")
