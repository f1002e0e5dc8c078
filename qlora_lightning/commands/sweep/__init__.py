"""``qlora-lightning sweep-rank``: double the rank while it pays; likewise target modules and learning rates."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_lightning.commands.options import OptionParser, quiet_lightning
from qlora_lightning.commands.output import add_json_option, check_output, tables_beside, write_json
from qlora_lightning.commands.sweep.dimensions import (
    Dimension,
    add_dimension_options,
    choose_dimension,
    refuse_ignored,
    show_value,
)
from qlora_lightning.support.console import brief
from qlora_lightning.support.errors import TrainingStopped, UserError

_DESCRIPTION = """Train a config with one rank after the other, and stop where the next one no longer pays.

Start at 8 and double: the sweep goes on while the loss on the validation rows falls by more than its noise, which is
a paired bootstrap over these rows. alpha is 2 × rank, data and their order are the same, the base is loaded once.
Every other option is one of `fit`. Each trial has a folder of its own in RUN/sweep-rank; the same command goes on
after a kill. With --target-modules or --learning-rates all values are tried, and the one with the fewest parameters
is chosen among those that the best does not beat by more than noise, of equals the one of the lowest loss."""
_EPILOG = """examples:
  qlora-lightning sweep-rank --config configs/quickstart.yaml --ranks 4,8 --trainer.max_steps 8
  qlora-lightning sweep-rank --config configs/quickstart.yaml --learning-rates 5e-4,1e-3 --trainer.max_steps 8

RUN/sweep-rank then holds sweep.json, sweep.png, and chosen.yaml, which `fit` takes."""


def main(argv: Sequence[str]) -> int:
    """Sweep; return the exit code.

    Raises:
        UserError: A key or value is wrong, or a trial cannot go on.
    """
    own, rest = _parser().parse_known_args(argv)
    dimension = choose_dimension(own)
    refuse_ignored(dimension, rest)
    file = check_output("--json", own.json, own.force)
    if not 0 <= own.min_gain < float("inf"):
        raise UserError(f"--min-gain is {own.min_gain:g}: expected 0 or more nats per token.")
    with tables_beside(file):
        _sweep(rest, dimension, own.min_gain, file)
    return 0


def _sweep(rest: Sequence[str], dimension: Dimension, min_gain: float, file: Path | None) -> None:
    # here, so that --help and mistakes answer at once
    from rich.console import Console
    from rich.text import Text

    from qlora_lightning.commands.sweep.choice import choose, is_done
    from qlora_lightning.commands.sweep.fit import run_trial
    from qlora_lightning.commands.sweep.plot import plot_sweep
    from qlora_lightning.commands.sweep.report import describe_last, print_table, summarize, write_results
    from qlora_lightning.commands.sweep.trial import Trial, check_same_rows

    console, trials, spare = Console(highlight=False), list[Trial](), None
    try:
        while not is_done(dimension, trials, min_gain):
            with _briefly() if trials else contextlib.nullcontext():  # the first reports base and data for all
                trial, folder, run_folder, spare = run_trial(rest, dimension, dimension.values[len(trials)], spare)
            trials.append(trial)
            check_same_rows(trials)
            console.print(describe_last(dimension, trials))
    except (UserError, TrainingStopped, KeyboardInterrupt) as stop:
        if trials:
            print_table(dimension, trials, console)
        if not isinstance(stop, UserError):
            console.print("The same command goes on with the sweep: finished trials count, this one is taken up.")
        raise
    chosen, why = choose(dimension, trials, min_gain)
    summary = summarize(dimension, trials, chosen, why, min_gain)
    try:
        config = write_results(folder, run_folder, chosen, summary)
        plot_sweep(folder / "sweep.png", dimension, trials, chosen)
    except OSError as error:
        raise UserError(f"{folder} could not be written to: {error.strerror or error}.") from error
    console.print()
    print_table(dimension, trials, console)
    console.print(Text.assemble("Chosen: ", (f"{dimension.title} {show_value(chosen.value)}", "bold"), f". {why}"))
    for words, path in (("adapter", folder / chosen.name / "adapter"), ("config", config)):
        console.print(f"Its {words}: {path}", markup=False, soft_wrap=True)
    console.print(f"The plot: {folder / 'sweep.png'}", markup=False, soft_wrap=True)
    if file is not None:
        write_json(file, summary)


@contextlib.contextmanager
def _briefly() -> Iterator[None]:
    """Leave out what the trials before have said."""
    with quiet_lightning(), brief():
        yield


def _parser() -> OptionParser:
    usage = "qlora-lightning sweep-rank --config FILE [--ranks N,N,…] [--json FILE] [options of fit]"
    parser = OptionParser("sweep-rank", _DESCRIPTION, _EPILOG, usage)
    add_dimension_options(parser)
    least = "nats per token that a gain must reach beside being above noise (default: 0)"
    parser.add_argument("--min-gain", type=float, default=0.0, metavar="X", help=least)
    add_json_option(parser)
    return parser
