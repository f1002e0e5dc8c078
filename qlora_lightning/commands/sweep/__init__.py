"""``qlora-lightning sweep-rank``: double the rank while it pays; likewise target modules and learning rates."""

import argparse
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from qlora_lightning.commands.options import (
    OptionParser,
    add_json_option,
    check_output,
    quiet_lightning,
    tables_beside,
    write_output,
)
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER
from qlora_lightning.support.imports import without_garbage_collection

_DESCRIPTION = """Train a config with one rank after the other, and stop where the next one no longer pays.

Start at 8 and double: the sweep continues while the loss on the validation rows falls by more than its noise, which is
a paired bootstrap over these rows. alpha is 2 × rank, data and their order are the same.
Every other option is one of `fit`. Each trial has a folder of its own in RUN/sweep-rank; the same command continues
after a kill. With --target-modules or --learning-rates all values are tried, and the one with the fewest parameters
is chosen among those that the best does not beat by more than noise, of equals the one of the lowest loss."""
_EPILOG = """examples:
  qlora-lightning sweep-rank --config configs/quickstart.yaml --ranks 4,8 --trainer.max_steps 8
  qlora-lightning sweep-rank --config configs/quickstart.yaml --learning-rates 5e-4,1e-3 --trainer.max_steps 8

RUN/sweep-rank then holds sweep.json, sweep.png, and chosen.yaml, which `fit` takes."""


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    Attributes:
        setting: Key under ``model``.
        values: In the order in which they are tried.
        min_gain: By how many nats per token a loss must fall at least, beside by more than its noise.
    """

    setting: str
    values: tuple[Any, ...]
    min_gain: float = 0.0

    @property
    def name(self) -> str:
        """The setting as people read it."""
        return self.setting.replace("_", " ")

    @property
    def rises(self) -> bool:
        """Whether each value is compared with the one before it, and the sweep ends at the first that does not pay."""
        return self.setting == "rank"

    @property
    def folder(self) -> str:
        """Name of the sweep's folder inside the run folder."""
        return f"sweep-{self.setting.replace('_', '-')}"

    def trial_folder(self, value: Any) -> str:
        """Return the name of a trial's folder inside the sweep's: ``rank-8``."""
        return re.sub(r"[^\w.+-]", "_", f"{self.setting.replace('_', '-')}-{value}")


def main(argv: Sequence[str]) -> int:
    """Sweep; return the exit code."""
    options, rest = _parser().parse_known_args(argv)
    sweep = Sweep("rank", tuple(sorted(options.ranks or (8, 16, 32, 64))), options.min_gain)
    if options.target_modules:
        sweep = Sweep("target_modules", options.target_modules, options.min_gain)
    elif options.learning_rates:
        sweep = Sweep("learning_rate", options.learning_rates, options.min_gain)
    for key in (sweep.setting, *(["alpha"] if sweep.rises else [])):
        if any(word.partition("=")[0] in (f"--model.{key}", f"--model.init_args.{key}") for word in rest):
            raise UserError(f"--model.{key}: the sweep sets it itself (alpha is 2 × rank). Leave it out.")
    options.json = check_output("--json", options.json, options.force)
    with tables_beside(options.json):
        summary = _run(sweep, rest)
        if options.json is not None:
            write_output(options.json, summary)
    return 0


def _run(sweep: Sweep, arguments: Sequence[str]) -> dict[str, Any]:
    """Train and compare trials until the sweep is done; return its figures."""
    with without_garbage_collection():  # here, so that --help and mistakes answer at once
        from qlora_lightning.commands.sweep import results
        from qlora_lightning.commands.sweep.trial import run_trial

    trials, cli = list[results.Trial](), None
    try:
        while not results.is_done(sweep, trials):
            with quiet_lightning() if trials else contextlib.nullcontext():  # the first reports for all
                cli = run_trial(arguments, sweep, sweep.values[len(trials)])
            trials.append(cli.trial)
            results.check_same_rows(trials)
            say(f"{sweep.name} {cli.trial.value}: val_loss {cli.trial.loss:.4f}")
    except (UserError, SystemExit, KeyboardInterrupt) as stop:
        if trials:
            results.print_table(sweep, trials)
        if not isinstance(stop, UserError):
            say("The same command continues the sweep: finished trials count, this one is resumed.")
        raise
    assert cli is not None
    chosen, why = results.choose(sweep, trials)
    summary = results.write_results(cli.folder, cli.run_folder, sweep, trials, chosen, why)
    results.print_table(sweep, trials)
    say(f"Chosen: {sweep.name} {chosen.value}. {why}")
    say(f"Its adapter: {cli.folder / chosen.folder / ADAPTER_FOLDER}")
    say(f"Its config: {cli.folder / 'chosen.yaml'}")
    say(f"The plot: {cli.folder / 'sweep.png'}")
    return summary


def _parser() -> OptionParser:
    usage = "qlora-lightning sweep-rank --config FILE [--ranks N,N,…] [--json FILE] [options of fit]"
    parser = OptionParser("sweep-rank", _DESCRIPTION, _EPILOG, usage)
    one = parser.add_mutually_exclusive_group().add_argument
    one("--ranks", type=_values_of(PositiveInt), metavar="N,N,…", help="ranks to try (default: 8,16,32,64)")
    one("--target-modules", type=_values_of(str), metavar="NAME,…", help="instead: what carries an adapter")
    one("--learning-rates", type=_values_of(PositiveFloat), metavar="X,…", help="instead: learning rates to try")
    least = "nats per token that a gain must reach beside being above noise (default: 0)"
    parser.add_argument("--min-gain", type=NonNegativeFloat, default=0.0, metavar="X", help=least)
    add_json_option(parser)
    return parser


def _values_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        parsed = tuple(kind(part.strip()) for part in text.split(","))
        if len(parsed) < 2 or len(set(parsed)) < len(parsed):
            raise argparse.ArgumentTypeError(f"{text!r}: expected two values or more, each once, as 8,16,32")
        return parsed

    return values
