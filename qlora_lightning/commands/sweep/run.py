"""The sweep: fits in a loop, compared row by row, and a table, a picture and files of them."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from rich.table import Table
from rich.text import Text

from qlora_lightning.callbacks import AdapterLine, Evaluation, StopSignals
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
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, load_yaml, read_json_object
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

    @property
    def rises(self) -> bool:
        return self.setting == "rank"

    def pays(self, gain: Interval) -> bool:
        """Whether a gain is above noise and large enough."""
        return gain.low > 0 and gain.value >= self.min_gain


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
    trials: list[Trial] = []
    try:
        while not is_done(sweep, trials):
            cli = _TrialCLI(arguments, sweep, sweep.values[len(trials)])
            trials.append(cli.run_trial())
            first, last = trials[0], trials[-1]
            say(f"{last.folder}: val_loss {last.loss:.4f}")
            if (first.tokens, first.validation) != (last.tokens, last.validation):
                raise UserError(
                    f"{first.folder} and {last.folder} have other validation rows: the file has changed in between. "
                    "Choose another folder by `--trainer.default_root_dir runs/NAME`, and sweep again."
                )
    except (SystemExit, KeyboardInterrupt):
        say("The same command continues the sweep: finished trials count, this one is resumed.")
        raise
    chosen, why = choose(sweep, trials)
    figures = _write_results(cli.folder, cli.run_folder, sweep, trials, chosen, why)
    say(f"Chosen: {chosen.folder}. {why}")
    say(f"Its adapter: {cli.folder / chosen.folder / ADAPTER_FOLDER}")
    say(f"Its config: {cli.folder / 'chosen.yaml'}")
    say(f"The plot: {cli.folder / 'sweep.png'}")
    return figures


# ---- which trial is chosen -------------------------------------------------------------------------------------------


def measure_gain(before: Trial, after: Trial) -> Interval:
    """Return by how many nats per token the loss is lower than before, by a paired bootstrap over rows.

    Efron and Tibshirani 1993, chapter 13. The interval says what other validation rows would do, not what another seed
    of the training would.
    """
    earlier, later = (list(zip(each.nll, each.tokens, strict=True)) for each in (before, after))
    return measure("loss", {"after": later, "before": earlier}).differences["before"]


def find_gains(sweep: Sweep, trials: Sequence[Trial]) -> list[Interval | None]:
    """Return each trial's gain: over the one before if values rise, else over the best, which itself has none."""
    if sweep.rises:
        return [None, *(measure_gain(*pair) for pair in itertools.pairwise(trials))]
    best = min(trials, key=lambda trial: trial.loss)
    return [None if trial is best else measure_gain(best, trial) for trial in trials]


def is_done(sweep: Sweep, trials: Sequence[Trial]) -> bool:
    """Whether no further value needs to be tried."""
    stops = sweep.rises and len(trials) > 1 and not sweep.pays(measure_gain(*trials[-2:]))
    return stops or len(trials) == len(sweep.values)


def choose(sweep: Sweep, trials: Sequence[Trial]) -> tuple[Trial, str]:
    """Choose one of at least two trials; return it, and why.

    Of ranks, it is the last one that paid over the one before it. Of anything else, it is the one with the fewest
    parameters among those that the best does not beat by more than noise, and of equals the one of the lowest loss.
    """
    if sweep.rises:
        before, last = trials[-2:]
        gain = measure_gain(before, last)
        if sweep.pays(gain):
            return last, "Each rank paid over the one before it: a larger one may pay too."
        return before, f"Rank {last.value} does not pay: it gains {_format(gain)} nats per token."
    best = min(trials, key=lambda trial: trial.loss)
    near = [trial for trial in trials if trial is best or not sweep.pays(measure_gain(trial, best))]
    names = ", ".join(str(trial.value) for trial in near)
    why = f"Within noise of the lowest loss: {names}. It has the fewest parameters, or of equals the lowest loss."
    return min(near, key=lambda trial: (trial.parameters, trial.loss)), why


def _format(gain: Interval | None) -> str:
    return "" if gain is None else format_interval(gain, percent=False, sign="+", digits=4)


# ---- a trial ---------------------------------------------------------------------------------------------------------


class _TrialCLI(QLoRACLI):
    """``fit`` of one value in a folder of its own; if that holds the finished trial, it is read instead."""

    def __init__(self, arguments: Sequence[str], sweep: Sweep, value: Any) -> None:
        self._sweep, self._value = sweep, value
        super().__init__(arguments, "fit")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        setting, name = self._sweep.setting, self._sweep.setting.replace("_", "-")
        # the update is alpha / rank · B A x: with alpha = 2 × rank each rank acts as strongly
        set_here = {f"--model.{setting}": str(self._value), **({"--model.alpha": "null"} if self._sweep.rises else {})}
        for key in (*set_here, "--ckpt_path"):
            if any(word.partition("=")[0].replace(".init_args", "") == key for word in args):
                raise UserError(f"{key}: the sweep sets it itself (alpha is 2 × rank). Leave it out.")
        args = [*args, *(f"{key}={value}" for key, value in set_here.items())]
        asked = self.parse(args)
        if setting != "learning_rate" and (asked["model"].get("init_args") or {}).get("adapter"):
            raise UserError(f"model.adapter brings its own {name}: leave it out, or sweep --learning-rates.")
        self.run_folder = Path(asked["trainer"]["default_root_dir"])
        refuse_moved_run(self.configs, self.run_folder)
        self.folder = self.run_folder / f"sweep-{name}"
        own = self.folder / re.sub(r"[^\w.+-]", "_", f"{name}-{self._value}")
        refuse_links(self.folder, own)
        args += ["--trainer.default_root_dir", str(own)]
        self._command = ["qlora-lightning", "fit", *args]
        super().parse_arguments(parser, [*args, "--ckpt_path", "last"])

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1 or is_trial_run(trainer):
            raise UserError("A sweep needs --trainer.devices 1, and no trainer.fast_dev_run, which keeps nothing.")
        stops = find_callback(trainer, StopSignals)
        if stops is not None:
            stops.explains_resume = False  # the sweep does
        # evaluation of the run, and how to use it, are left out; its losses are computed instead
        callbacks = [each for each in callbacks_of(trainer) if not isinstance(each, Evaluation | AdapterLine)]
        trainer.callbacks = [*callbacks, _TrialEvaluation(self._sweep, self._value)]
        return trainer

    def run_trial(self) -> Trial:
        """Read the trial if it is done, else train and evaluate it."""
        folder = Path(self.trainer.default_root_dir)
        if (folder / CONFIG).exists():
            before = flatten(load_yaml((folder / CONFIG).read_text(encoding="utf-8")) or {})
            now = flatten(load_yaml(yaml.safe_dump(self._short_config())))
            changed = [key for key in now if key not in _MAY_DIFFER and before.get(key, now[key]) != now[key]]
            if changed:
                raise UserError(
                    f"{folder} holds a trial with another {', '.join(changed)}, which would be compared with these. "
                    "Put it back, or choose another folder by `--trainer.default_root_dir runs/NAME`."
                )
        file = folder / "trial.json"
        stored = read_json_object(file, "Remove it, and the trial is evaluated again.") if file.exists() else {}
        if stored.keys() == Trial.__annotations__.keys():
            say(f"{folder}: done before")
            return Trial(**stored)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
        evaluation = find_callback(self.trainer, _TrialEvaluation)
        if evaluation is None or evaluation.results is None:
            raise UserError(f"{folder.name} ended before it was evaluated: start the same command again.")
        trial = Trial(
            folder=folder.name,
            value=self._value,
            parameters=sum(tensor.numel() for tensor in trainable_tensors(self.model).values()),
            steps=self.trainer.global_step,
            seconds=evaluation.time_elapsed(),
            validation=identity_of_data(self.trainer).get("val"),
            nll=[row.nll for row in evaluation.results],
            tokens=[row.labelled_tokens for row in evaluation.results],
        )
        write_output(file, json.dumps(asdict(trial)) + "\n")  # from then on it counts as done
        return trial


class _TrialEvaluation(Timer):
    """Computes the losses of a trial's best adapter when training has ended."""

    def __init__(self, sweep: Sweep, value: Any) -> None:
        super().__init__()
        self._sweep, self._value = sweep, value
        self.results: Any = None

    def on_fit_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        module: Any = trainer.lightning_module
        if self._sweep.rises and describe_adapter(module.model)["rank"] != self._value:
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
            self.results = evaluate_rows(pl_module, validation_batches(trainer), watch=stop_if_asked)


# ---- table, picture and files ----------------------------------------------------------------------------------------


def _write_results(
    folder: Path, run_folder: Path, sweep: Sweep, trials: Sequence[Trial], chosen: Trial, why: str
) -> dict[str, Any]:
    """Print the table, and write ``sweep.json``, ``sweep.png`` and ``chosen.yaml``; return all figures."""
    gains, over = find_gains(sweep, trials), "the one before" if sweep.rises else "the best"
    title = f"val_loss of {len(trials[0].nll):,} rows in nats per token; gain over {over}"
    table = Table("", "parameters", "val_loss", "gain, 95 % interval", "time", title=title, title_justify="left")
    figures: list[dict[str, Any]] = []
    for trial, gain in zip(trials, gains, strict=True):
        cells = f"{trial.parameters:,}", f"{trial.loss:.4f}", Text(_format(gain)), f"{trial.seconds:,.0f} s"
        table.add_row(Text(trial.folder), *cells)
        names = ("value", "folder", "parameters", "steps", "seconds")
        figures.append({name: getattr(trial, name) for name in names})
        figures[-1] |= {"val_loss": trial.loss, "gain": None if gain is None else plain_interval(gain)}
    terminal().print(table)
    summary = {
        "setting": f"model.{sweep.setting}",
        "min_gain": sweep.min_gain,
        "rows": len(trials[0].nll),
        "trials": figures,
        "gain_is_over": over,
        "chosen": chosen.value,
        "why": why,
    }
    write_output(folder / "sweep.json", summary)
    config = load_yaml((folder / chosen.folder / CONFIG).read_text(encoding="utf-8"))
    config["trainer"]["default_root_dir"] = str(run_folder)
    write_output(folder / "chosen.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for place, (trial, gain) in enumerate(zip(trials, gains, strict=True)):
        reach = None if gain is None else [[max(0.0, gain.high - gain.value)], [max(0.0, gain.value - gain.low)]]
        filled = "C0" if trial is chosen else "white"
        axes.errorbar(place, trial.loss, yerr=reach, fmt="o", color="C0", markerfacecolor=filled)
    axes.set_xticks(range(len(trials)), [trial.folder for trial in trials])
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title(f"Filled: chosen. Bars: 95 % interval of the difference from {over}", fontsize=9)
    figure.savefig(folder / "sweep.png")
    return summary
