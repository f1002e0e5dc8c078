"""``qlora-lightning sweep``: double the rank while it pays, or search any settings of ``fit`` with Optuna."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse.typing import PositiveInt

from qlora_lightning.commands.options import OptionParser, add_json_option, json_output
from qlora_lightning.commands.sweep_trials import (
    PRUNES_AFTER,
    REMEDY,
    Planned,
    Range,
    Space,
    Trial,
    choose,
    count_combinations,
    describe_settings,
    format_value,
    measure_noise,
    plan_ranks,
    plan_search,
)
from qlora_lightning.support.console import make_table, say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, write_whole
from qlora_lightning.support.values import check_setting

if TYPE_CHECKING:
    from qlora_lightning.commands.fit import QLoRACLI

_DESCRIPTION = """Train a config with one rank after the other until doubling it no longer pays; or search settings.

Start at 8 and double: the sweep continues while the loss on the validation rows falls by more than its noise, the
largest difference between --seeds trainings of the first trial. alpha is 2 × rank.
With --search it tries the values of any keys of a config instead, and chooses the trial with the fewest parameters
among those that the best does not beat by more than noise, of equals the one with the lowest loss.
Every other option is one of `fit`. Each trial is a fit in a process and a folder of its own in RUN/sweep. The same
command continues after a kill. Started again beside it, also on another machine with the same disk, it helps."""
_EPILOG = """examples:
  qlora-lightning sweep --config configs/quickstart.yaml --ranks 4,8 --trainer.limit_train_batches 8
  qlora-lightning sweep --config configs/quickstart.yaml --search model.learning_rate=1e-4..1e-2 --trials 3 --seeds 1

RUN/sweep/rank, or RUN/sweep/learning-rate and so on, then has sweep.json, sweep.png, chosen.yaml for `fit`, and
study.journal, which `optuna-dashboard` opens."""
_RANKS = (8, 16, 32, 64)
_N_TRIALS = 10
_SET_HERE = {  # keys that the sweep itself sets
    "seed_everything": "use --seeds",
    "ckpt_path": "each trial continues by itself",
    "trainer.default_root_dir": "each trial has a folder of its own",
    "trainer.devices": "each trial has one",
}
_SHAPE = ("rank", "alpha", "dropout", "target_modules", "layers", "target_experts", "lora_options")  # of an adapter


def main(argv: Sequence[str]) -> int:
    """Sweep; return the exit code."""
    parser = OptionParser("sweep", _DESCRIPTION, _EPILOG, fit=True)
    ranks_help = "ranks to try, one after the other while it pays (default: 8,16,32,64)"
    parser.add_argument("--ranks", type=_parse_ranks, metavar="N,N,…", help=ranks_help)
    search_help = "instead: values of a key to try, as model.learning_rate=1e-5..1e-3 or model.dropout=0,0.1"
    parser.add_argument("--search", type=_parse_search, action="append", metavar="KEY=VALUES", help=search_help)
    trials_help = f"values to draw from the ranges of --search (default: {_N_TRIALS})"
    parser.add_argument("--trials", type=PositiveInt, metavar="N", help=trials_help)
    prune_help = "end a trial of --search early if its validation loss is above the median of the earlier ones"
    parser.add_argument("--prune", action="store_true", help=prune_help)
    seeds_help = "trainings of the first trial, to measure what another seed alone does (default: 3; 1: do not)"
    parser.add_argument("--seeds", type=PositiveInt, default=3, metavar="N", help=seeds_help)
    parser.add_argument("--holdout-seed", type=int, help=argparse.SUPPRESS)  # in the process of a trial
    add_json_option(parser)
    options, fit_options = parser.parse_known_args(argv)
    if find_spec("optuna") is None:
        raise UserError("sweep needs Optuna: `pip install 'qlora-lightning[sweep]'`.", "sweep.optuna")
    if options.holdout_seed is not None:
        from qlora_lightning.commands.sweep_study import run_trial

        return run_trial(options.holdout_seed, fit_options)
    space = _read_space(options, fit_options)
    with json_output(options) as figures:
        figures |= _run_sweep(space, options, fit_options)
    return 0


# ---- options ---------------------------------------------------------------------------------------------------------


def _parse_ranks(text: str) -> tuple[int, ...]:
    with contextlib.suppress(ValueError):
        values = tuple(sorted(int(part) for part in text.split(",")))
        if len(values) >= 2 and len(set(values)) == len(values):
            return values
    raise argparse.ArgumentTypeError(f"{text!r}: expected two ranks or more, each once, as 8,16,32")


def _parse_search(text: str) -> tuple[str, Any]:
    """Return a key and its values: both ends of a range, or a list of texts and numbers."""
    key, _, values = text.partition("=")
    low, dots, high = values.partition("..")
    with contextlib.suppress(ValueError, yaml.YAMLError):
        ends = [_read_number(end) for end in (low, high)] if dots else []
        if ends and ends[0] < ends[1]:
            return key, Range(*(ends if all(isinstance(end, int) for end in ends) else map(float, ends)))
        # lists of lists too: [q_proj,v_proj],[all-linear]
        parts = [] if dots else yaml.load(f"[{values}]", yaml.BaseLoader)  # noqa: S506  # texts alone
        choices = [_read_choice(part) for part in parts]
        if len(choices) >= 2 and len(set(choices)) == len(choices):
            return key, choices
    raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=LOW..HIGH, or two values or more, each once, as KEY=A,B")


def _read_number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        if not math.isfinite(number := float(text)):
            raise
        return number


def _read_choice(part: Any) -> Any:
    try:
        return _read_number(part)
    except (TypeError, ValueError):
        return part if isinstance(part, str) else yaml.safe_dump(part, default_flow_style=True, width=10**6).strip()


def _read_space(options: argparse.Namespace, fit_options: Sequence[str]) -> Space:
    """Return the keys of a sweep with their values; reject options that would have no effect, or contradict it."""
    if not options.search:
        for name, is_set in (("--trials", options.trials), ("--prune", options.prune)):
            if is_set:
                raise UserError(f"{name} is for --search: ranks are tried one after the other. Leave it out.")
        space: Space = {"model.rank": options.ranks or _RANKS}
    elif options.ranks:
        raise UserError("--ranks doubles and --search tries: leave one out, or write --search model.rank=8,16,32.")
    else:
        keys = [key.replace(".init_args.", ".") for key, _ in options.search]
        space = dict(zip(keys, (values for _, values in options.search), strict=True))
        if len(space) < len(keys):
            raise UserError(f"--search has a key twice: {', '.join(keys)}. Name each once.")
        size, is_drawn = count_combinations(space), any(isinstance(values, Range) for values in space.values())
        if options.trials and not is_drawn:
            raise UserError(f"--trials is for ranges: all {size:,} combinations are tried. Leave it out.")
        n_trials = options.trials or (min(_N_TRIALS, size) if is_drawn else size)
        if n_trials > size:
            raise UserError(f"--trials is {n_trials}, and --search has {size:,} combinations: pass --trials {size}.")
        if options.prune and n_trials <= PRUNES_AFTER:
            raise UserError(f"--prune begins after {PRUNES_AFTER} trials, and there are {n_trials}. Leave it out.")
    typed = {option[2:].partition("=")[0].replace(".init_args.", ".") for option in fit_options if option[:2] == "--"}
    sets = {*space, "ckpt_path"} | ({"model.alpha"} if "model.rank" in space else set())
    for key in typed & sets:
        raise UserError(f"The sweep sets {key} itself: leave --{key} out.", key)
    for key in space:
        if key in _SET_HERE or key.partition(".")[0] not in ("model", "data", "trainer"):
            reason = _SET_HERE.get(key, "it changes no training")
            raise UserError(f"--search {key}: {reason}. Expected a key under model, data or trainer.", key)
    return space


def _setting_options(settings: Mapping[str, Any]) -> list[str]:
    """Return settings of a trial as options of ``fit``."""
    options = [f"--{key}={value}" for key, value in settings.items()]
    if "model.rank" in settings and "model.alpha" not in settings:
        # the update is alpha / rank · B A x: alpha = 2 × rank scales it equally at each rank
        options.append("--model.alpha=null")
    return options


# ---- checks before a trial -------------------------------------------------------------------------------------------


def _check_config(cli: QLoRACLI, space: Space) -> None:
    """Reject a config of which trials cannot be compared."""
    from qlora_lightning.commands.plan import count_devices

    config = cli.short_config()
    shape = [key for key in space if key.removeprefix("model.") in _SHAPE]
    if shape and config["model"].get("adapter"):
        raise UserError(f"model.adapter brings its own {shape[0].removeprefix('model.')}: leave it out.")
    if config["seed_everything"] is False:
        raise UserError("seed_everything is false, but trials are compared under one seed: set it to a number.")
    for key, writes_nothing in (  # no metrics.csv, or nothing of a run folder
        ("trainer.logger", config["trainer"]["logger"] is False),
        ("trainer.fast_dev_run", config["trainer"]["fast_dev_run"]),
        ("adapter_checkpoint.enabled", config["adapter_checkpoint"]["enabled"] is False),
    ):
        if writes_nothing:
            raise UserError(f"A sweep compares what its trials write: leave {key} out.", key)
    for key, values in space.items():
        section, _, name = key.partition(".")
        is_whole = isinstance(values, Range) and isinstance(values.low, int)
        if is_whole and isinstance(config[section].get(name), float):
            low, high = values
            raise UserError(
                f"--search {key}={low}..{high} would draw whole numbers only, but {key} takes any: "
                f"write {low}.0..{high}.0.",
                key,
            )
    if count_devices(cli.config["trainer"]) > 1:
        raise UserError("A sweep needs --trainer.devices 1.", "trainer.devices")


def _check_validations(data: Any, trainer: Mapping[str, Any], prune: bool) -> None:
    """Reject a config of which no trial would be validated, as far as that is known before it runs.

    To prune a trial takes a validation before the last one.
    """
    from qlora_lightning.commands.plan import plan_epoch
    from qlora_lightning.support.trainer import steps_to_validation

    check_setting("trainer.limit_val_batches", 0, trainer["limit_val_batches"] != 0, "rows to compare trials by")
    data.setup("fit")
    epoch = plan_epoch(data.plan_epochs(), trainer)
    interval = trainer["val_check_interval"] or 1.0
    if epoch.all_steps is None or trainer["overfit_batches"] or not isinstance(interval, int | float):  # unknown
        return
    window, every_n_epochs = trainer["accumulate_grad_batches"], trainer["check_val_every_n_epoch"]
    steps = steps_to_validation(epoch.batches, window, interval, every_n_epochs)
    if epoch.all_steps < steps:
        raise UserError(f"A trial ends at step {epoch.all_steps:,}, before its first validation. {REMEDY}")
    if prune and epoch.all_steps < 2 * steps:
        raise UserError("--prune needs several validations in a trial: set trainer.val_check_interval.")


def _check_values(arguments: Sequence[str], space: Space, rows: str) -> None:
    """Reject values that ``fit`` does not take, and those with which other rows are validated; load no weights."""
    from qlora_lightning.commands.fit import QLoRACLI

    is_shape = any(key.removeprefix("model.") in _SHAPE for key in space)
    reads_data = any(key.startswith("data.") for key in space)
    first = {key: values[0] for key, values in space.items()}
    for settings in [first] + [first | {key: value} for key, values in space.items() for value in values[1:]]:
        cli = QLoRACLI([*arguments, *_setting_options(settings)])
        if is_shape:
            _check_shape(cli.model)
        if reads_data:
            cli.datamodule.setup("validate")
            if cli.datamodule.identity["val"] != rows:
                text = ", ".join(f"{key}={value}" for key, value in settings.items())
                raise UserError(f"With {text} the validation rows are others, and losses on them do not compare.")


def _check_shape(module: Any) -> None:
    """Reject an adapter that does not fit the base, on the meta device, unless the base has code of its own."""
    from qlora_lightning.model.load.build import meta_base, put_adapters
    from qlora_lightning.model.load.wrapped import open_text_config
    from qlora_lightning.sources.folders import open_base

    if module.overrides("build_model") or module.trust_remote_code:
        return
    source = open_base(module.base, module.revision, weights=False)
    put_adapters(meta_base(open_text_config(source.folder, module.base)), None, **module.adapter_options)


# ---- the sweep -------------------------------------------------------------------------------------------------------


def _run_sweep(space: Space, options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Train trials until none is wanted, compare them, and return the figures."""
    from qlora_lightning.callbacks.run_folder import refuse_links
    from qlora_lightning.commands.fit import QLoRACLI
    from qlora_lightning.commands.sweep_study import Trials, train_trial

    cli = QLoRACLI(arguments)
    config, ranks = cli.short_config(), not options.search
    _check_config(cli, space)
    cli.datamodule.setup("validate")  # a sweep compares trials on validation rows
    _check_validations(cli.datamodule, cli.config["trainer"], options.prune)
    hashes = {split: cli.datamodule.identity[split] for split in ("train", "val")}  # a file may have changed
    _check_values(arguments, space, hashes["val"])
    sweeps = Path(config["trainer"]["default_root_dir"]) / "sweep"
    folder = sweeps / "-".join(key.rpartition(".")[2].replace("_", "-") for key in space)
    refuse_links(sweeps, folder)
    # ranks and seeds may become more: the sweep continues
    searched = None if ranks else {key: list(values) for key, values in space.items()}
    trainer = {**config["trainer"], "default_root_dir": None}  # where the disk is mounted
    settings = yaml.safe_dump({**config, "trainer": trainer, "search": searched, "rows": hashes})
    settings_file = folder / "settings.yaml"
    if settings_file.exists() and settings_file.read_text(encoding="utf-8") != settings:
        raise UserError(
            f"{folder} holds a sweep with other settings or rows ({settings_file}): put them back, or choose another "
            "folder by `--trainer.default_root_dir runs/NAME`."
        )
    write_whole(settings_file, settings)

    seed = int(config["seed_everything"])
    is_drawn = any(isinstance(values, Range) for values in space.values())
    n_drawn = (options.trials or int(min(_N_TRIALS, count_combinations(space)))) if is_drawn else 0
    plan = plan_ranks(options.ranks or _RANKS, options.seeds) if ranks else plan_search(space, options.seeds, n_drawn)

    def train(planned: Planned, values: Mapping[str, Any], prune: Any) -> Trial:
        trial_folder = folder / planned.name
        command = ["sweep", f"--holdout-seed={seed}", *arguments, *_setting_options(values)]
        command += [f"--trainer.default_root_dir={trial_folder}", "--ckpt_path=last"]
        command += [f"--seed_everything={seed + planned.seed}", "--evaluation.enabled=false"]
        return train_trial(
            trial_folder, command, planned, values, prune if options.prune and not planned.seed else None
        )

    ended = Trials(folder, space, seed).run(plan, train)
    wanted = plan(ended)
    repeated = [ended[each.name] for each in wanted if each.seed or each.name == wanted[0].name]
    trials, noise = [ended[each.name] for each in wanted if not each.seed], measure_noise(repeated)
    if not any(math.isfinite(trial.val_loss) for trial in trials):
        raise UserError(f"All trials diverged ({folder}): choose lower learning rates.")
    chosen, reason = choose(trials, noise, ranks)
    return _write(folder, trials, chosen, noise, reason, arguments)


def _write(
    folder: Path, trials: Sequence[Trial], chosen: Trial, noise: float, reason: str, arguments: Sequence[str]
) -> dict[str, Any]:
    """Print the table, write the files, and return the figures."""
    from qlora_lightning.commands.fit import QLoRACLI

    keys, title = list(chosen.settings), "val_loss; "
    title += (
        ("another seed alone diverges" if math.isinf(noise) else f"another seed alone makes {noise:.4f}")
        if noise
        else "one seed"
    )
    rows = []
    for trial in trials:
        loss = f"{trial.val_loss:.4f}" if math.isfinite(trial.val_loss) else "diverged"
        values = [format_value(trial.settings[key]) for key in keys]
        loss += " (pruned)" if trial.pruned else ""
        rows.append([trial.folder, *values, f"{trial.parameters:,}", loss, f"{trial.minutes:,.1f}"])
    names = [key.rpartition(".")[2] for key in keys]
    say(make_table(("", *names, "parameters", "val_loss", "minutes"), rows, title))
    figures = {
        "settings": keys,
        "spread_of_seeds": noise if math.isfinite(noise) else None,
        "trials": [trial.figures() for trial in trials],
        "chosen": chosen.folder,
        "why": reason,
    }
    write_whole(folder / "sweep.json", figures)
    _draw(trials, chosen, noise, folder / "sweep.png")
    config = QLoRACLI([*arguments, *_setting_options(chosen.settings)]).short_config()
    write_whole(folder / "chosen.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    say(f"Chosen: {folder / chosen.folder / ADAPTER_FOLDER}. {reason}")
    say(f"Its config, with the limits of a trial: {folder / 'chosen.yaml'}, the plot: {folder / 'sweep.png'}")
    return figures


def _draw(trials: Sequence[Trial], chosen: Trial, noise: float, file: Path) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    trials = [trial for trial in trials if math.isfinite(trial.val_loss)]
    for x, trial in enumerate(trials):
        fill = "C0" if trial is chosen else "white"
        bar = noise if math.isfinite(noise) else 0.0
        axes.errorbar(x, trial.val_loss, yerr=bar, fmt="o", color="C0", markerfacecolor=fill)
    labels = [f"{describe_settings(trial)}{' (pruned)' if trial.pruned else ''}" for trial in trials]
    axes.set_xticks(range(len(trials)), labels, rotation=90 if len(trials) > 4 else 0)
    axes.set_ylabel("validation loss")
    axes.set_title("Filled: chosen. Bars: what another seed alone makes", fontsize=9)
    figure.savefig(file)
