"""``qlora-lightning sweep-rank``: double the rank while it pays; likewise target modules and learning rates."""

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt

from qlora_lightning.commands.options import OptionParser, add_json_option, json_output
from qlora_lightning.report import read_manifest, read_run
from qlora_lightning.report.figures import find_figures
from qlora_lightning.support.console import make_table, say
from qlora_lightning.support.errors import Diverged, UserError, check_setting
from qlora_lightning.support.files import ADAPTER_FOLDER, write_whole

_DESCRIPTION = """Train a config with one rank after the other, and stop where the next one no longer pays.

Start at 8 and double: the sweep continues while the loss on the validation rows falls by more than its noise, the
largest difference between --seeds trainings with the first value. alpha is 2 × rank.
Every other option is one of `fit`. Each trial has a folder of its own in RUN/sweep-rank; the same command continues
after a kill. With --target-modules or --learning-rates all values are tried, and the one with the fewest parameters
is chosen among those that the best does not beat by more than noise, of equals the one of the lowest loss."""
_EPILOG = """examples:
  qlora-lightning sweep-rank --config configs/quickstart.yaml --ranks 4,8 --trainer.limit_train_batches 8
  qlora-lightning sweep-rank --config configs/quickstart.yaml --learning-rates 5e-4,1e-3 --seeds 1

RUN/sweep-rank, or RUN/sweep-learning-rate and so on, then has sweep.json, sweep.png, and chosen.yaml for `fit`."""
_REMEDY = "Shorten the epoch by trainer.limit_train_batches instead of max_steps, or set trainer.val_check_interval."


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
        figures |= _run_sweep(setting, values, options.seeds, fit_options)
    return 0


def _parse_values(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        with contextlib.suppress(ValueError):
            values = tuple(kind(part.strip()) for part in text.split(","))
            if len(values) >= 2 and len(set(values)) == len(values):
                return values
        raise argparse.ArgumentTypeError(f"{text!r}: expected two values or more, each once, as 8,16,32")

    return parse


@dataclass(frozen=True)
class Trial:
    """A training that has ended."""

    folder: str
    value: Any
    parameters: int  # that train
    val_loss: float  # the lowest; infinite if it diverged
    minutes: float

    def figures(self) -> dict[str, Any]:
        """Return the fields for JSON, which has no infinity."""
        return asdict(self) | {"val_loss": self.val_loss if math.isfinite(self.val_loss) else None}


def _run_sweep(setting: str, values: Sequence[Any], seeds: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Train a trial for each value of a key under ``model``, compare them, and return the figures.

    Ranks rise, and the first that does not pay ends the sweep; of another setting all values are tried.
    """
    from qlora_lightning.callbacks.run_folder import refuse_links
    from qlora_lightning.commands.fit import QLoRACLI

    cli = QLoRACLI(arguments)
    config = cli.short_config()
    if setting != "learning_rate" and config["model"].get("adapter"):
        raise UserError(f"model.adapter brings its own {setting}: leave it out, or sweep --learning-rates.")
    if config["seed_everything"] is False:
        raise UserError("seed_everything is false, but trials are compared under one seed: set it to a number.")
    for key, writes_nothing in (  # no metrics.csv, or nothing of a run folder
        ("trainer.logger", config["trainer"]["logger"] is False),
        ("trainer.fast_dev_run", config["trainer"]["fast_dev_run"]),
        ("adapter_checkpoint.enabled", config["adapter_checkpoint"]["enabled"] is False),
    ):
        if writes_nothing:
            raise UserError(f"A sweep compares what its trials write: leave {key} out.", key)
    cli.datamodule.setup("validate")  # a sweep compares trials on validation rows
    _check_validation(cli.datamodule, cli.config["trainer"])
    run_folder, name = Path(config["trainer"]["default_root_dir"]), setting.replace("_", "-")
    folder = run_folder / f"sweep-{name}"
    refuse_links(folder)
    hashes = {split: cli.datamodule.identity[split] for split in ("train", "val")}  # a file may have changed
    settings_file, settings = folder / "settings.yaml", yaml.safe_dump({**config, "rows": hashes})
    if settings_file.exists() and settings_file.read_text(encoding="utf-8") != settings:
        raise UserError(
            f"{folder} holds a sweep with other settings or rows ({settings_file}): put them back, or choose another "
            "folder by `--trainer.default_root_dir runs/NAME`."
        )
    write_whole(settings_file, settings)

    def run(value: Any, repeat: int = 0) -> Trial:
        trial_folder = folder / re.sub(r"[^\w.+-]", "_", f"{name}-{value}" + (f"-seed-{repeat}" if repeat else ""))
        refuse_links(trial_folder)
        seed = config["seed_everything"]
        options = [f"--model.{setting}={value}", f"--trainer.default_root_dir={trial_folder}", "--ckpt_path=last"]
        # the update is alpha / rank · B A x: alpha = 2 × rank scales it equally at each rank
        options += ["--model.alpha=null"] if setting == "rank" else []
        options += [f"--seed_everything={seed + repeat}", "--evaluation.enabled=false"]
        if read_manifest(trial_folder).get("status") != "finished":  # in an earlier sweep that was stopped
            trial_cli = QLoRACLI([*arguments, *options], "fit")
            if trial_cli.trainer.world_size > 1:
                raise UserError("A sweep needs --trainer.devices 1.")
            trial_cli.datamodule.holdout_seed = seed  # the same rows are held out in all trials
            try:
                trial_cli.run()
            except Diverged as error:
                say(f"{trial_folder.name}: {error}")
        result = read_run(trial_folder)
        figures, n_trainable = find_figures(result), result.manifest["parameters"]["trainable"]
        if result.status == "failed":  # it diverged
            return Trial(trial_folder.name, value, n_trainable, math.inf, figures["minutes"].value)
        if "val_loss" not in figures:
            raise UserError(f"{trial_folder} ended before its first validation: no loss to compare. {_REMEDY}")
        say(f"{trial_folder.name}: val_loss {figures['val_loss'].value:.4f}")
        return Trial(trial_folder.name, value, n_trainable, figures["val_loss"].value, figures["minutes"].value)

    trials = [run(values[0])]
    losses = [trials[0].val_loss, *(run(values[0], repeat).val_loss for repeat in range(1, seeds))]
    losses = [loss for loss in losses if math.isfinite(loss)]
    noise = max(losses) - min(losses) if losses else 0.0
    for value in values[1:]:
        trials.append(run(value))
        if setting == "rank" and not _pays(trials[-2], trials[-1], noise):
            break
    if not math.isfinite(min(trial.val_loss for trial in trials)):
        raise UserError(f"All trials diverged ({folder}): choose lower learning rates.")
    chosen, reason = choose(setting, trials, noise)
    title = f"val_loss; {f'another seed alone makes {noise:.4f}' if noise else 'one seed'}"
    rows = []
    for trial in trials:
        loss = f"{trial.val_loss:.4f}" if math.isfinite(trial.val_loss) else "diverged"
        rows.append([trial.folder, f"{trial.parameters:,}", loss, f"{trial.minutes:,.1f}"])
    say(make_table(("", "parameters", "val_loss", "minutes"), rows, title))
    figures = {
        "setting": f"model.{setting}",
        "spread_of_seeds": noise,
        "trials": [trial.figures() for trial in trials],
        "chosen": chosen.value,
        "why": reason,
    }
    write_whole(folder / "sweep.json", figures)
    _draw(trials, chosen, noise, folder / "sweep.png")
    config["model"] |= {setting: chosen.value, **({"alpha": None} if setting == "rank" else {})}
    write_whole(folder / "chosen.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    say(f"Chosen: {folder / chosen.folder / ADAPTER_FOLDER}. {reason}")
    say(f"Its config, with the limits of a trial: {folder / 'chosen.yaml'}, the plot: {folder / 'sweep.png'}")
    return figures


def _check_validation(data: Any, trainer: Mapping[str, Any]) -> None:
    """Reject a config of which no trial would be validated, as far as that is known before it runs."""
    from qlora_lightning.commands.plan import plan_epoch
    from qlora_lightning.support.trainer import steps_to_validation

    check_setting("trainer.limit_val_batches", 0, trainer["limit_val_batches"] != 0, "rows to compare trials by")
    data.setup("fit")
    epoch = plan_epoch(data.plan_epochs(), trainer)
    interval = trainer["val_check_interval"] or 1.0
    if epoch.all_steps is None or trainer["overfit_batches"] or not isinstance(interval, int | float):  # unknown
        return
    window, every_n_epochs = trainer["accumulate_grad_batches"], trainer["check_val_every_n_epoch"]
    if epoch.all_steps < steps_to_validation(epoch.batches, window, interval, every_n_epochs):
        raise UserError(f"A trial ends at step {epoch.all_steps:,}, before its first validation. {_REMEDY}")


def _pays(reference: Trial, trial: Trial, noise: float) -> bool:
    """Whether a trial's loss is lower than the reference's by more than the noise."""
    return reference.val_loss - trial.val_loss > noise


def choose(setting: str, trials: Sequence[Trial], noise: float) -> tuple[Trial, str]:
    """Choose one of at least two trials; return it, and why.

    Among ranks, it is the last that paid over the one before it. Otherwise, it is the one with the fewest parameters
    among those that the best does not beat by more than noise, and among equals the one with the lowest loss.
    """
    if setting == "rank":
        prior, last = trials[-2:]
        if _pays(prior, last, noise):
            return last, "Each rank paid over the one before it: a larger one may pay too."
        if not math.isfinite(last.val_loss):
            return prior, f"Rank {last.value} diverged."
        gain = prior.val_loss - last.val_loss
        seed_gain = f", another seed {noise:.4f}" if noise else ""
        return prior, f"Rank {last.value} does not pay: it gains {gain:+.4f}{seed_gain}."
    best = min(trials, key=lambda trial: trial.val_loss)
    candidates = [trial for trial in trials if trial is best or not _pays(trial, best, noise)]
    names = ", ".join(str(trial.value) for trial in candidates)
    reason = f"Within noise of the lowest loss: {names}. It has the fewest parameters, or of equals the lowest loss."
    return min(candidates, key=lambda trial: (trial.parameters, trial.val_loss)), reason


def _draw(trials: Sequence[Trial], chosen: Trial, noise: float, file: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    trials = [trial for trial in trials if math.isfinite(trial.val_loss)]
    for x, trial in enumerate(trials):
        fill = "C0" if trial is chosen else "white"
        axes.errorbar(x, trial.val_loss, yerr=noise, fmt="o", color="C0", markerfacecolor=fill)
    axes.set_xticks(range(len(trials)), [trial.folder for trial in trials])
    axes.set_ylabel("validation loss")
    axes.set_title("Filled: chosen. Bars: what another seed alone makes", fontsize=9)
    figure.savefig(file)
