"""A sweep: fits in a loop, compared row by row, and a table, a picture and files of them."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from rich.table import Table
from rich.text import Text

from qlora_lightning.callbacks import Evaluation, StopSignals
from qlora_lightning.callbacks.adapter_checkpoint import best_adapter
from qlora_lightning.callbacks.evaluation import validation_batches
from qlora_lightning.callbacks.run_folder import refuse_links
from qlora_lightning.commands.config import refuse_moved_run
from qlora_lightning.commands.options import write_output
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.evaluation.intervals import Interval, format_interval, measure, plain_interval
from qlora_lightning.evaluation.row_results import evaluate_rows
from qlora_lightning.model.adapters.identity import describe_adapter, identity_of_data
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.report.sections import flatten
from qlora_lightning.support.console import say, terminal
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, load_yaml
from qlora_lightning.support.trainer import callbacks_of, datamodule_of, find_callback, is_trial_run

_MAY_DIFFER = {"trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.logger"}


@dataclass(frozen=True)
class Sweep:
    """What is varied: a key under ``model``, its values in the order in which they are tried, and what a gain must be.

    Ranks rise: each is compared with the one before it, and the first that does not pay is the last.
    """

    setting: str
    values: tuple[Any, ...]
    min_gain: float = 0.0
    seeds: int = 1  # trainings with the first value

    @property
    def rises(self) -> bool:
        return self.setting == "rank"


@dataclass(frozen=True)
class Trial:
    """A training that has ended, with the summed loss and the labelled tokens of each validation row."""

    folder: str
    value: Any
    parameters: int
    steps: int
    seconds: float
    validation: str | None  # hash of the samples, if the data module knows one
    nll: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """The mean over all labelled tokens, in nats."""
        return sum(self.nll) / max(1, sum(self.tokens))


def run_sweep(sweep: Sweep, arguments: Sequence[str]) -> dict[str, Any]:
    """Train and compare trials until the sweep is done; return its figures. ``arguments`` are options of ``fit``."""
    name, fixed = sweep.setting.replace("_", "-"), [f"--model.{sweep.setting}"]
    fixed += ["--model.alpha"] if sweep.rises else []
    for word in arguments:
        if (key := word.partition("=")[0].replace(".init_args", "")) in (*fixed, "--ckpt_path"):
            raise UserError(f"{key}: the sweep sets it itself (alpha is 2 × rank). Leave it out.")
    asked = QLoRACLI(arguments, with_trainer=False)
    if sweep.setting != "learning_rate" and (asked.config["model"].get("init_args") or {}).get("adapter"):
        raise UserError(f"model.adapter brings its own {name}: leave it out, or sweep --learning-rates.")
    run_folder = Path(asked.config["trainer"]["default_root_dir"])
    refuse_moved_run(asked.configs, run_folder)
    folder, seeds = run_folder / f"sweep-{name}", sweep.seeds
    if seeds > 1 and (asked.config["data"].get("init_args") or {}).get("val_fraction") is not None:
        say("Noise is that of the rows alone: under data.val_fraction another seed would hold out other rows.")
        seeds = 1

    settings = yaml.safe_dump(asked.short_config())
    _check_settings(folder / "settings.yaml", settings)

    def run(value: Any, repeat: int = 0) -> Trial:
        own = folder / re.sub(r"[^\w.+-]", "_", f"{name}-{value}" + (f"-seed-{repeat}" if repeat else ""))
        refuse_links(folder, own)
        options = [f"--model.{sweep.setting}={value}", f"--trainer.default_root_dir={own}", "--ckpt_path=last"]
        # the update is alpha / rank · B A x: with alpha = 2 × rank each rank acts as strongly
        options += ["--model.alpha=null"] if sweep.rises else []
        options += [f"--seed_everything={int(asked.config['seed_everything']) + repeat}"] if repeat else []
        trial = _run_trial(sweep, value, [*arguments, *options])
        say(f"{trial.folder}: val_loss {trial.loss:.4f}")
        return trial

    try:
        trials = [run(sweep.values[0])]
        write_output(folder / "settings.yaml", settings)
        spread = measure_spread([trials[0], *(run(sweep.values[0], repeat) for repeat in range(1, seeds))])
        while not is_done(sweep, trials, spread):
            trials.append(run(sweep.values[len(trials)]))
    except (SystemExit, KeyboardInterrupt):
        say("The same command continues the sweep: each trial is resumed where it was.")
        raise
    chosen, why = choose(sweep, trials, spread)
    figures = _summarize(sweep, trials, spread, chosen, why)
    write_output(folder / "sweep.json", figures)
    _draw(sweep, trials, chosen, folder / "sweep.png")
    config = load_yaml((folder / chosen.folder / CONFIG).read_text(encoding="utf-8"))
    config["trainer"]["default_root_dir"] = str(run_folder)
    write_output(folder / "chosen.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    say(f"Chosen: {chosen.folder}. {why}")
    say(f"Its adapter: {folder / chosen.folder / ADAPTER_FOLDER}")
    say(f"Its config: {folder / 'chosen.yaml'}, the plot: {folder / 'sweep.png'}")
    return figures


def _check_settings(file: Path, settings: str) -> None:
    """Reject other settings than those of the trials that are there: what is not alike would be compared."""
    refuse_links(file.parent)
    now = flatten(load_yaml(settings))
    before = flatten(load_yaml(file.read_text(encoding="utf-8"))) if file.exists() else now
    changed = [key for key in now if key not in _MAY_DIFFER and before.get(key, now[key]) != now[key]]
    if changed:
        raise UserError(
            f"{file.parent} holds a sweep with another {', '.join(changed)}. Put it back, or choose another folder by "
            "`--trainer.default_root_dir runs/NAME`."
        )


# ---- a trial ---------------------------------------------------------------------------------------------------------


def _run_trial(sweep: Sweep, value: Any, arguments: Sequence[str]) -> Trial:
    """Train as ``fit`` does, or resume; of a finished training only the losses are computed again."""
    cli = QLoRACLI(arguments, "fit")
    trainer: Any = cli.trainer
    if trainer.world_size > 1 or is_trial_run(trainer):
        raise UserError("A sweep needs --trainer.devices 1, and no trainer.fast_dev_run, which keeps nothing.")
    stops = find_callback(trainer, StopSignals)
    if stops is not None:
        stops.explains_resume = False  # the sweep does
    # evaluation of the run, and how to use it, are left out; its losses are computed instead
    losses = _Losses(value if sweep.rises else None)
    callbacks = [each for each in callbacks_of(trainer) if not isinstance(each, Evaluation)]
    trainer.callbacks = [*callbacks, losses]
    trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.checkpoint)
    return Trial(
        folder=Path(trainer.default_root_dir).name,
        value=value,
        parameters=sum(tensor.numel() for tensor in trainable_tensors(cli.model).values()),
        steps=trainer.global_step,
        seconds=losses.time_elapsed(),
        validation=identity_of_data(trainer).get("val"),
        nll=[row.nll for row in losses.rows],
        tokens=[row.labelled_tokens for row in losses.rows],
    )


class _Losses(Timer):
    """Computes the losses of a trial's best adapter when training has ended."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._rank = rank
        self.rows: Sequence[Any] = ()

    def on_fit_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        module: Any = trainer.lightning_module
        if self._rank is not None and describe_adapter(module.model)["rank"] != self._rank:
            raise UserError(f"build_model of {type(module).__name__} ignores self.adapter_options['rank'].")
        samples = getattr(datamodule_of(trainer), "samples", None)
        if (isinstance(samples, dict) and "val" not in samples) or not trainer.limit_val_batches:
            raise UserError(
                "A sweep compares trials on validation rows, and there are none: name a file in data.val, or hold "
                "some out by data.val_fraction: 0.1 (and leave trainer.limit_val_batches above 0)."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stops = find_callback(trainer, StopSignals)

        def stop_if_asked(_: int) -> None:
            if stops is not None and stops.received is not None:
                stops.end(trainer, "Stopped while the trial was evaluated.")

        with best_adapter(trainer, pl_module):
            self.rows = evaluate_rows(pl_module, validation_batches(trainer), watch=stop_if_asked)


# ---- which trial is chosen -------------------------------------------------------------------------------------------


def measure_spread(repeats: Sequence[Trial]) -> float:
    """Return the largest difference that another seed alone makes to the loss; 0 of one trial."""
    losses = [trial.loss for trial in repeats]
    return max(losses) - min(losses)


def measure_gain(before: Trial, after: Trial) -> Interval:
    """Return by how many nats per token the loss is lower than before, by a paired bootstrap over rows.

    Efron and Tibshirani 1993, chapter 13. The interval says what other validation rows would do; what another seed of
    the training would, says :func:`measure_spread`.
    """
    if (before.tokens, before.validation) != (after.tokens, after.validation):
        raise UserError(
            f"{before.folder} and {after.folder} have other validation rows: the file has changed in between. Choose "
            "another folder by `--trainer.default_root_dir runs/NAME`, and sweep again."
        )
    earlier, later = (list(zip(each.nll, each.tokens, strict=True)) for each in (before, after))
    return measure("loss", {"after": later, "before": earlier}).differences["before"]


def pays(sweep: Sweep, gain: Interval, spread: float) -> bool:
    """Whether a gain is above the noise of rows and of seeds, and large enough."""
    return gain.low > 0 and gain.value > spread and gain.value >= sweep.min_gain


def is_done(sweep: Sweep, trials: Sequence[Trial], spread: float) -> bool:
    """Whether no further value needs to be tried."""
    stops = sweep.rises and len(trials) > 1 and not pays(sweep, measure_gain(*trials[-2:]), spread)
    return stops or len(trials) == len(sweep.values)


def choose(sweep: Sweep, trials: Sequence[Trial], spread: float) -> tuple[Trial, str]:
    """Choose one of at least two trials; return it, and why.

    Of ranks, it is the last one that paid over the one before it. Of anything else, it is the one with the fewest
    parameters among those that the best does not beat by more than noise, and of equals the one of the lowest loss.
    """
    if sweep.rises:
        before, last = trials[-2:]
        gain = measure_gain(before, last)
        if pays(sweep, gain, spread):
            return last, "Each rank paid over the one before it: a larger one may pay too."
        seeds = f"; another seed alone makes {spread:.4f}" if spread else ""
        return before, f"Rank {last.value} does not pay: it gains {_format(gain)} nats per token{seeds}."
    best = min(trials, key=lambda trial: trial.loss)
    near = [trial for trial in trials if trial is best or not pays(sweep, measure_gain(trial, best), spread)]
    names = ", ".join(str(trial.value) for trial in near)
    why = f"Within noise of the lowest loss: {names}. It has the fewest parameters, or of equals the lowest loss."
    return min(near, key=lambda trial: (trial.parameters, trial.loss)), why


def _format(gain: Interval | None) -> str:
    return "" if gain is None else format_interval(gain, percent=False, sign="+", digits=4)


def find_gains(sweep: Sweep, trials: Sequence[Trial]) -> list[Interval | None]:
    """Return each trial's gain: over the one before if values rise, else over the best, which itself has none."""
    if sweep.rises:
        return [None, *(measure_gain(*pair) for pair in itertools.pairwise(trials))]
    best = min(trials, key=lambda trial: trial.loss)
    return [None if trial is best else measure_gain(best, trial) for trial in trials]


# ---- table and picture -----------------------------------------------------------------------------------------------


def _summarize(sweep: Sweep, trials: Sequence[Trial], spread: float, chosen: Trial, why: str) -> dict[str, Any]:
    """Print the table, and return all figures."""
    over = "the one before" if sweep.rises else "the best"
    title = f"val_loss of {len(trials[0].nll):,} rows in nats per token; gain over {over}"
    title += f"; another seed alone makes {spread:.4f}" if spread else ""
    table = Table("", "parameters", "val_loss", "gain, 95 % interval", "time", title=title, title_justify="left")
    figures: list[dict[str, Any]] = []
    for trial, gain in zip(trials, find_gains(sweep, trials), strict=True):
        cells = f"{trial.parameters:,}", f"{trial.loss:.4f}", Text(_format(gain)), f"{trial.seconds:,.0f} s"
        table.add_row(Text(trial.folder), *cells)
        names = ("value", "folder", "parameters", "steps", "seconds")
        figures.append({name: getattr(trial, name) for name in names})
        figures[-1] |= {"val_loss": trial.loss, "gain": None if gain is None else plain_interval(gain)}
    terminal().print(table)
    return {
        "setting": f"model.{sweep.setting}",
        "min_gain": sweep.min_gain,
        "spread_of_seeds": spread,
        "rows": len(trials[0].nll),
        "trials": figures,
        "gain_is_over": over,
        "chosen": chosen.value,
        "why": why,
    }


def _draw(sweep: Sweep, trials: Sequence[Trial], chosen: Trial, file: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for number, (trial, gain) in enumerate(zip(trials, find_gains(sweep, trials), strict=True)):
        reach = None if gain is None else [[max(0.0, gain.high - gain.value)], [max(0.0, gain.value - gain.low)]]
        filled = "C0" if trial is chosen else "white"
        axes.errorbar(number, trial.loss, yerr=reach, fmt="o", color="C0", markerfacecolor=filled)
    axes.set_xticks(range(len(trials)), [trial.folder for trial in trials])
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Filled: chosen. Bars: 95 % interval of the gain", fontsize=9)
    figure.savefig(file)
