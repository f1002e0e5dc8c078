"""``qlora-lightning sweep-rank``: double the rank while it pays; likewise target modules and learning rates."""

import argparse
import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lightning.commands.options import (
    OptionParser,
    add_json_option,
    check_output,
    quiet_lightning,
    tables_beside,
    write_json,
)
from qlora_lightning.support.console import brief
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.imports import quick_imports

_DESCRIPTION = """Train a config with one rank after the other, and stop where the next one no longer pays.

Start at 8 and double: the sweep continues while the loss on the validation rows falls by more than its noise, which is
a paired bootstrap over these rows. alpha is 2 × rank, data and their order are the same, the base is loaded once.
Every other option is one of `fit`. Each trial has a folder of its own in RUN/sweep-rank; the same command continues
after a kill. With --target-modules or --learning-rates all values are tried, and the one with the fewest parameters
is chosen among those that the best does not beat by more than noise, of equals the one of the lowest loss."""
_EPILOG = """examples:
  qlora-lightning sweep-rank --config configs/quickstart.yaml --ranks 4,8 --trainer.max_steps 8
  qlora-lightning sweep-rank --config configs/quickstart.yaml --learning-rates 5e-4,1e-3 --trainer.max_steps 8

RUN/sweep-rank then holds sweep.json, sweep.png, and chosen.yaml, which `fit` takes."""
_RANKS = "8,16,32,64"


def main(argv: Sequence[str]) -> int:
    """Sweep; return the exit code."""
    own, rest = _parser().parse_known_args(argv)
    dimension = _choose_dimension(own)
    _refuse_ignored(dimension, rest)
    file = check_output("--json", own.json, own.force)
    if not 0 <= own.min_gain < float("inf"):
        raise UserError(f"--min-gain is {own.min_gain:g}: expected 0 or more nats per token.")
    with tables_beside(file):
        _sweep(rest, dimension, own.min_gain, file)
    return 0


def _sweep(rest: Sequence[str], dimension: "Dimension", min_gain: float, file: Path | None) -> None:
    with quick_imports():  # here, so that --help and mistakes answer at once
        from rich.console import Console
        from rich.text import Text

        from qlora_lightning.commands.sweep.choice import Trial, check_same_rows, choose, is_done
        from qlora_lightning.commands.sweep.report import describe_last, print_table, write_results
        from qlora_lightning.commands.sweep.trial import run_trial

    console, trials, done = Console(highlight=False), list[Trial](), None
    try:
        while not is_done(dimension, trials, min_gain):
            with _briefly() if trials else contextlib.nullcontext():  # the first reports base and data for all
                done = run_trial(rest, dimension, dimension.values[len(trials)], done.spare if done else None)
            trials.append(done.judged)
            check_same_rows(trials)
            console.print(describe_last(dimension, trials))
    except (UserError, SystemExit, KeyboardInterrupt) as stop:  # as a signal's, and what Lightning makes of Ctrl-C
        if trials:
            print_table(dimension, trials, console)
        if not isinstance(stop, UserError):
            console.print("The same command continues the sweep: finished trials count, this one is resumed.")
        raise
    assert done is not None
    chosen, why = choose(dimension, trials, min_gain)
    try:
        summary = write_results(done.folder, done.root, dimension, trials, (chosen, why), min_gain)
    except OSError as error:
        raise UserError(f"{done.folder} could not be written to: {error.strerror or error}.") from error
    console.print()
    print_table(dimension, trials, console)
    console.print(Text.assemble("Chosen: ", (f"{dimension.title} {show_value(chosen.value)}", "bold"), f". {why}"))
    paths = {"Its adapter": f"{chosen.name}/adapter", "Its config": "chosen.yaml", "The plot": "sweep.png"}
    for words, path in paths.items():
        console.print(f"{words}: {done.folder / path}", markup=False, soft_wrap=True)
    if file is not None:
        write_json(file, summary)


@contextlib.contextmanager
def _briefly() -> Iterator[None]:
    """Leave out what the trials before have reported."""
    with quiet_lightning(), brief():
        yield


# ---- what is varied --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dimension:
    """One setting, and the values that are tried.

    Attributes:
        setting: Key under ``model``.
        title: Heading of its column, label of the plot's axis.
        values: In the order in which they are tried.
        stops: Whether the sweep ends at a value that is not better than the one before it.
    """

    setting: str
    title: str
    values: tuple[Any, ...]
    stops: bool = False

    @property
    def folder(self) -> str:
        """Name of the sweep's folder inside the run folder; each trial's begins alike."""
        return f"sweep-{self.setting.replace('_', '-')}"


def show_value(value: Any) -> str:
    """Write a value as the user would: ``2e-4`` and not ``0.0002``."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return str(value)


def _choose_dimension(own: argparse.Namespace) -> Dimension:
    """Turn the options into the one dimension that they ask for; ranks if they ask for none."""
    given = [name for name in ("ranks", "target_modules", "learning_rates") if getattr(own, name) is not None]
    if len(given) > 1:
        asked = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{asked}: a sweep varies one thing at a time. Fix the best of one, then sweep the other.")
    if given == ["target_modules"]:
        names = _split("--target-modules", own.target_modules, str, "attention,mlp,all-linear")
        return Dimension("target_modules", "target modules", names)
    if given == ["learning_rates"]:
        rates = _split("--learning-rates", own.learning_rates, float, "1e-4,2e-4,4e-4")
        if not all(0 < rate < float("inf") for rate in rates):
            raise UserError(f"--learning-rates is {own.learning_rates!r}: expected positive numbers.")
        return Dimension("learning_rate", "learning rate", rates)
    text = _RANKS if own.ranks is None else own.ranks
    ranks = _split("--ranks", text, int, _RANKS)
    if ranks[0] < 1 or list(ranks) != sorted(ranks):
        raise UserError(f"--ranks is {text!r}: expected positive integers that rise.")
    return Dimension("rank", "rank", ranks, stops=True)


def _split(option: str, text: str, kind: Callable[[str], Any], example: str) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} is {text!r}: expected values with commas between, such as {example}.") from error
    if len(values) < 2 or len(set(values)) < len(values) or "" in values:
        raise UserError(f"{option} is {text!r}: expected two values or more, each once, such as {example}.")
    return values


def _refuse_ignored(dimension: Dimension, arguments: Sequence[str]) -> None:
    """Reject on the command line what a sweep would drop: its own setting, and alpha if ranks are swept.

    Those of a config belong to that config's own training.
    """
    for before, after in itertools.pairwise([*arguments, ""]):
        name, equals, value = before.partition("=")
        given = value if equals else after
        if name.endswith(f".{dimension.setting}"):
            values = ", ".join(map(show_value, dimension.values))
            raise UserError(
                f"{name} {given}: the sweep sets model.{dimension.setting} itself, to {values}. Leave it out."
            )
        if dimension.setting == "rank" and name.endswith(".alpha") and given.lower() not in ("null", "~"):
            raise UserError(
                f"{name} {given}: in a sweep of ranks alpha follows the rank, 2 × rank, so that each acts as "
                "strongly. Leave it out, or sweep --target-modules or --learning-rates."
            )


def trial_name(dimension: Dimension, value: Any) -> str:
    """Return the name of a trial's folder inside the sweep's: ``rank-8``."""
    return re.sub(r"[^\w.+-]", "_", f"{dimension.setting.replace('_', '-')}-{show_value(value)}")


def _parser() -> OptionParser:
    usage = "qlora-lightning sweep-rank --config FILE [--ranks N,N,…] [--json FILE] [options of fit]"
    parser = OptionParser("sweep-rank", _DESCRIPTION, _EPILOG, usage)
    add = parser.add_argument
    add("--ranks", metavar="N,N,…", help=f"ranks to try, rising (default: {_RANKS})")
    add("--target-modules", metavar="NAME,…", help="instead: what carries an adapter")
    add("--learning-rates", metavar="X,…", help="instead: learning rates to try")
    least = "nats per token that a gain must reach beside being above noise (default: 0)"
    add("--min-gain", type=float, default=0.0, metavar="X", help=least)
    add_json_option(parser)
    return parser
