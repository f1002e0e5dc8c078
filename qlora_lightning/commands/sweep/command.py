"""``qlora-lightning sweep-rank``: double the rank while it pays; likewise target modules and learning rates."""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse.typing import PositiveInt

from qlora_lightning.commands.options import OptionParser, add_json_option, json_output

_DESCRIPTION = """Train a config with one rank after the other, and stop where the next one no longer pays.

Start at 8 and double: the sweep continues while the loss on the validation rows falls by more than its noise, the
largest difference between --seeds trainings with the first value. alpha is 2 × rank.
Every other option is one of `fit`. Each trial has a folder of its own in RUN/sweep-rank; the same command continues
after a kill. With --target-modules or --learning-rates all values are tried, and the one with the fewest parameters
is chosen among those that the best does not beat by more than noise, of equals the one of the lowest loss."""
_EPILOG = """examples:
  qlora-lightning sweep-rank --config configs/quickstart.yaml --ranks 4,8 --trainer.limit_train_batches 8
  qlora-lightning sweep-rank --config configs/quickstart.yaml --learning-rates 5e-4,1e-3 --seeds 1

RUN/sweep-rank then holds sweep.json, sweep.png, and chosen.yaml, which `fit` takes."""


def main(argv: Sequence[str]) -> int:
    """Sweep; return the exit code."""
    parser = OptionParser("sweep-rank", _DESCRIPTION, _EPILOG, fit=True)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--ranks", type=_parse_values(int), metavar="N,N,…", help="ranks to try (default: 8,16,32,64)")
    add("--target-modules", type=_parse_values(str), metavar="NAME,…", help="instead: what carries an adapter")
    add("--learning-rates", type=_parse_values(float), metavar="X,…", help="instead: learning rates to try")
    seeds_help = "trainings with the first value, to measure what another seed alone does (default: 3; 1: do not)"
    parser.add_argument("--seeds", type=PositiveInt, default=3, metavar="N", help=seeds_help)
    add_json_option(parser)
    options, fit_options = parser.parse_known_args(argv)
    setting, values = "rank", sorted(options.ranks or (8, 16, 32, 64))
    if options.target_modules:
        setting, values = "target_modules", options.target_modules
    elif options.learning_rates:
        setting, values = "learning_rate", options.learning_rates
    with json_output(options) as figures:
        # here, so that --help and mistakes answer at once
        from qlora_lightning.commands.sweep.trials import run_sweep

        figures.update(run_sweep(setting, values, options.seeds, fit_options))
    return 0


def _parse_values(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        with contextlib.suppress(ValueError):
            values = tuple(kind(part.strip()) for part in text.split(","))
            if len(values) >= 2 and len(set(values)) == len(values):
                return values
        raise argparse.ArgumentTypeError(f"{text!r}: expected two values or more, each once, as 8,16,32")

    return parse
