"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with our module, data and callbacks."""

import contextlib
import functools
import json
import logging
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jsonargparse
import rich
import yaml
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.markup import escape

from qlora_lightning.callbacks import (
    AdapterCheckpoint,
    AdapterEMA,
    DryBatch,
    Evaluation,
    GPUMemoryMonitor,
    GradientCheckpointing,
    LoadingLines,
    LossSpikeMonitor,
    MemoryComparison,
    PredictionWriter,
    RunReport,
    StopSignals,
    ThroughputMonitor,
)
from qlora_lightning.callbacks.checkpoint_file import check_checkpoint, find_checkpoint
from qlora_lightning.callbacks.metrics_logger import MetricsLogger
from qlora_lightning.callbacks.progress_bar import choose_progress_display
from qlora_lightning.callbacks.run_folder import RunFolder, refuse_started_folder
from qlora_lightning.callbacks.stop_signals import ProcessWatch, was_requeued
from qlora_lightning.commands.config import (
    check_keys,
    describe_parse_error,
    expand_arguments,
    expand_config,
    find_user_error,
    read_configs,
    refuse_moved_run,
    shorten_config,
)
from qlora_lightning.commands.options import ParagraphFormatter
from qlora_lightning.commands.processes import check_strategy, find_lost_process, set_timeout
from qlora_lightning.data.chat.tokenizer import tokenizer_of_base
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.model.checkpoint.format import find_foreign_class, read_checkpoint, read_content, usable_settings
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml
from qlora_lightning.support.trainer import is_trial_run

_DEFAULT_CLASSES = {
    "model": "qlora_lightning.QLoRAModule",
    "data": "qlora_lightning.InstructionDataModule",
}
_PARSER_MODE = "qlora_yaml"
_TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "default_root_dir": "runs/default",
    "log_every_n_steps": 1,  # a step of a language model takes seconds: a line for each is cheap
    "enable_model_summary": False,  # the adapter table says more
}

# arguments of the Trainer's methods, which a run folder's config.yaml holds
_METHOD_KEYS = ("ckpt_path", "weights_only", "verbose", "return_predictions")
_KNOWN_KEYS: dict[str, type | None] = {
    "seed_everything": None,
    "trainer": Trainer,
    "model": QLoRAModule,
    "data": InstructionDataModule,
    "gradient_checkpointing": GradientCheckpointing,
    "adapter_checkpoint": AdapterCheckpoint,
    "gpu_memory": GPUMemoryMonitor,
    "throughput": ThroughputMonitor,
    "evaluation": Evaluation,
    "ema": AdapterEMA,
    "config": None,
    **dict.fromkeys(_METHOD_KEYS),
}


_NAME_BASE = ("base", "revision", "trust_remote_code")


def _choose_tokenizer(base: str, revision: str | None, trust_remote_code: bool, chosen: Any) -> Any:
    """The tokenizer that the user named, else the base's."""
    return tokenizer_of_base(base, revision, trust_remote_code) if chosen is None else chosen


class QLoRACLI(LightningCLI):
    """LightningCLI with our keys; what a researcher's subclass of it may change are Lightning's own hooks."""

    def __init__(self, *args: Any, verb: str | None = None, **kwargs: Any) -> None:
        self._command = ["qlora-lightning", *(kwargs.get("args") or [])]
        self._verb = verb  # the only subcommand to make a parser for, which takes a while; None: all
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there, but called by self
        known = LightningCLI.subcommands()
        return known if self._verb is None else {self._verb: known[self._verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(GradientCheckpointing, "gradient_checkpointing")
        parser.add_lightning_class_args(AdapterCheckpoint, "adapter_checkpoint")
        parser.add_lightning_class_args(GPUMemoryMonitor, "gpu_memory")
        parser.add_lightning_class_args(ThroughputMonitor, "throughput")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(AdapterEMA, "ema")
        parser.set_defaults(
            {
                "model": {"class_path": _DEFAULT_CLASSES["model"]},
                "data": {"class_path": _DEFAULT_CLASSES["data"]},
                "gradient_checkpointing.enabled": False,
                "ema.enabled": None,  # on where a decay is given
            }
        )
        parser.link_arguments(
            (*(f"model.init_args.{name}" for name in _NAME_BASE), "data.init_args.tokenizer"),
            "data.init_args.tokenizer",
            compute_fn=_choose_tokenizer,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's warning that arguments come both from Python and from the command line."""
        self.config = self._parse(parser, args)
        settings = self.config[self.config.subcommand]
        refuse_moved_run(read_configs(args), settings["trainer"]["default_root_dir"])
        asked = settings.get("ckpt_path")
        if asked is None and self.config.subcommand == "fit" and was_requeued():
            asked = "last"
        if asked not in (None, "last"):
            check_checkpoint(asked)  # before Lightning reads it
        found = find_checkpoint(settings["trainer"]["default_root_dir"], asked)
        if found is not None:  # what neither config nor command line says is the checkpoint's
            stored = read_stored_settings(found, settings["model"].get("init_args") or {})
            self.config = self._parse(parser, [args[0], "--config", json.dumps({"model": stored}), *args[1:]])
        self.config[self.config.subcommand]["ckpt_path"] = found
        self._starts_fresh = asked is not None and found is None  # `last` of a folder that has none yet

    @staticmethod
    def _parse(parser: LightningArgumentParser, args: Any) -> Any:
        """Parse, and let ``~`` in the run folder be what it is to the Trainer, for all that is kept there."""
        config = parser.parse_args(args)
        trainer = config.get(config.get("subcommand"), config)["trainer"]
        trainer["default_root_dir"] = os.path.expanduser(trainer["default_root_dir"])
        return config

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the Trainer: ``metrics.csv`` is always written, other loggers come beside it."""
        settings = self._get(self.config_init, "trainer")
        if settings["accumulate_grad_batches"] < 1:
            raise UserError(
                f"trainer.accumulate_grad_batches is {settings['accumulate_grad_batches']}: expected 1 or more."
            )
        if (settings["gradient_clip_val"] or 0) < 0:
            raise UserError(
                f"trainer.gradient_clip_val is {settings['gradient_clip_val']:g}: expected 0 (off) or more."
            )
        check_strategy(settings["strategy"])
        folder, chosen = settings["default_root_dir"], settings.get("logger")
        others = [] if chosen in (None, True, False) else chosen if isinstance(chosen, list) else [chosen]
        own = [MetricsLogger(folder)] if self.subcommand == "fit" else []
        loggers: Any = False if chosen is False or settings.get("fast_dev_run") else [*own, *others] or False
        named = settings.get("callbacks") or []
        named = named if isinstance(named, list) else [named]
        usual: list[type[Callback]] = [StopSignals, MemoryComparison, DryBatch, LossSpikeMonitor, LoadingLines]
        usual += [PredictionWriter, ProcessWatch]
        added = [kind() for kind in usual if not any(isinstance(callback, kind) for callback in named)]
        config = self._short_config()
        told = [] if any(isinstance(each, RunReport) for each in named) else [RunReport(config, self._command)]
        callbacks = [*named, RunFolder(config), *told, *added]
        shows = settings["enable_progress_bar"] in (None, True)
        if shows and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(choose_progress_display())
        try:
            return super().instantiate_trainer(logger=loggers, callbacks=callbacks, **kwargs)
        except (ValueError, MisconfigurationException) as error:  # what Lightning does not take, in its own words
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _short_config(self) -> dict[str, Any]:
        settings = self.config.get(str(self.subcommand), self.config)
        text = self._parser(self.subcommand).dump(settings, skip_unset=False, skip_link_targets=False)
        config = {key: value for key, value in yaml.safe_load(text).items() if key not in ("config", "ckpt_path")}
        short = shorten_config(config, _DEFAULT_CLASSES)
        if short["data"].get("tokenizer") == tokenizer_of_base(*(short["model"].get(name) for name in _NAME_BASE)):
            short["data"]["tokenizer"] = None  # so that it follows the base when that is changed
        short["data"].pop("accept_changed_data", None)  # meant once: the next resume asks again
        return short

    def before_fit(self) -> None:
        """Keep a folder to one run, before anything large is loaded."""
        if self._starts_fresh:
            self._say("No checkpoint in the run folder yet: this starts fresh.")
        elif self.trainer.is_global_zero and not is_trial_run(self.trainer):
            refuse_started_folder(self.trainer.default_root_dir, self._found, table=True)

    @property
    def _found(self) -> str | None:
        found: str | None = self.config_init[str(self.subcommand)]["ckpt_path"]
        return found

    def _say(self, message: str) -> None:
        if self.trainer.is_global_zero:
            rich.print(escape(message))

    def _judge_what_was_trained(self) -> None:
        """Take the run folder's adapter unless the user names another: a fresh one would judge the base unnoticed."""
        if self._found is not None or getattr(self.model, "adapter", "other") is not None:
            return
        folder = AdapterCheckpoint.adapter_folder(self.trainer.default_root_dir)
        if (folder / "adapter_config.json").exists():
            self._say(f"Adapter: {folder}")
            self.model.adapter = str(folder)
        else:
            self._say("No --ckpt_path, no model.adapter and no adapter in the run folder: this judges the base alone.")

    before_validate = before_test = before_predict = _judge_what_was_trained


def read_stored_settings(checkpoint: str | Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's settings of a checkpoint.

    Arguments of a subclass are not among them: a file that named a class would decide which code runs. An optimizer
    is, if it is torch's or bitsandbytes' own.

    Args:
        checkpoint: its file.
        own: the model's settings as configs and command line give them.

    Raises:
        UserError: the file is no checkpoint, or a foreign one, or only it names an optimizer from elsewhere.
    """
    settings = read_content(read_checkpoint(checkpoint, mmap=True), str(checkpoint))["settings"]
    foreign = find_foreign_class(settings)
    if foreign is not None and own.get("optimizer") is None:
        raise UserError(
            f"{checkpoint} names the optimizer {foreign}, and a file must not decide which module is imported: if you "
            f"trust it, name it yourself by `--model.optimizer {foreign}`."
        )
    return usable_settings(QLoRAModule, settings)


_PARSER_OPTIONS = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": _PARSER_MODE}
_CLI_OPTIONS: dict[str, Any] = {
    "model_class": QLoRAModule,
    "datamodule_class": InstructionDataModule,
    "save_config_callback": None,  # RunFolder writes it
    "trainer_defaults": _TRAINER_DEFAULTS,
    "seed_everything_default": 42,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "auto_configure_optimizers": False,
    "load_from_checkpoint_support": False,
}


def main(argv: Sequence[str], cli: Callable[..., object] = QLoRACLI, name: str | None = None) -> int:
    """Run one of the four commands.

    Args:
        argv: the command and its options.
        cli: reads and runs it.
        name: what the user typed for it, if another command reads its options.

    Raises:
        UserError: a key or value is wrong.
    """
    verb = argv[0]
    help_texts = {
        "usage": f"qlora-lightning {verb} --config FILE [--KEY.NAME VALUE …]",
        "description": f"{_DESCRIPTIONS[verb]}\n\n{_KEYS}\n\nexamples:\n{EXAMPLES[verb]}",
    }
    options = {**_PARSER_OPTIONS, "formatter_class": _HelpFormatter}
    with _checked_and_logged(argv[1:], name or verb):
        cli(
            **_CLI_OPTIONS,
            verb=verb,
            parser_kwargs={**options, verb: {**options, **help_texts}},
            args=expand_arguments(argv),
        )
    return 0


@contextlib.contextmanager
def open_run(
    arguments: Sequence[str],
    command: str,
    adjust: Callable[[Any], None] = lambda settings: None,
    with_trainer: bool = True,
) -> Iterator[LightningCLI]:
    """Make what the options of ``fit`` describe, and run nothing: ``LightningCLI(run=False)`` with our keys.

    Within the context our code logs to the terminal, and errors are reported as those of ``fit``. Nothing is loaded:
    that is up to ``module.configure_model()`` and ``datamodule.setup(stage)``.

    Args:
        arguments: options of ``fit``; its name is not among them.
        command: the command that reads them, for messages.
        adjust: changes the parsed settings (``settings["trainer"]["devices"] = 1``) before anything is made of them.
        with_trainer: ``False`` makes no Trainer, and no logger, callback, plugin or profiler that it would have.

    Yields:
        LightningCLI: ``model``, ``datamodule``, ``trainer`` (or None) and ``config``, the settings.

    Raises:
        UserError: a key or value is wrong.
    """
    with _checked_and_logged(arguments, command):
        yield _OpenedRun(
            **_CLI_OPTIONS,
            parser_kwargs=_PARSER_OPTIONS,
            args=expand_arguments(arguments),
            adjust=adjust,
            with_trainer=with_trainer,
        )


class _OpenedRun(QLoRACLI):
    def __init__(self, *args: Any, adjust: Callable[[Any], None], with_trainer: bool, **kwargs: Any) -> None:
        self._adjust, self._with_trainer = adjust, with_trainer
        super().__init__(*args, run=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name in _METHOD_KEYS:
            parser.add_argument(f"--{name}", type=Any)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = self._parse(parser, args)
        if not self._with_trainer:
            for name in ("logger", "callbacks", "plugins", "profiler"):  # they may write, or need a device
                self.config["trainer"][name] = None
        self._adjust(self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return super().instantiate_trainer(**kwargs) if self._with_trainer else None


@contextlib.contextmanager
def _checked_and_logged(arguments: Sequence[str], command: str) -> Iterator[None]:
    """Check the keys of options of ``fit``, log to the terminal while they are used, and word what is wrong."""
    check_keys(arguments, read_configs(arguments), _KNOWN_KEYS)
    _read_whole_numbers_first()
    set_timeout()
    jsonargparse.set_loader(_PARSER_MODE, lambda text: expand_config(load_yaml(text)), exceptions=(yaml.YAMLError,))
    try:
        with _logging_to_terminal():
            yield
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{describe_parse_error(str(error))} See `qlora-lightning {command} --help`.") from error
    except (ValueError, MisconfigurationException) as error:
        raise find_user_error(error) or error from None
    except RuntimeError as error:
        raise find_lost_process(error) or error from None
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _read_whole_numbers_first() -> None:
    """Let the Trainer's settings that take a whole number or a fraction read 1 as one batch, not as all of them.

    jsonargparse tries the types of a union in their order. Python's typing keeps only one of ``Optional[Union[int,
    float]]`` and ``Optional[Union[float, int]]``, whichever a library made first, and forgets it after a while: which
    order the Trainer's own annotations have depends on what has been imported before it.
    """
    annotations = Trainer.__init__.__annotations__
    for name, annotation in annotations.items():
        kinds = get_args(annotation)
        if int in kinds and float in kinds:
            others = (kind for kind in kinds if kind is not int)
            annotations[name] = functools.reduce(operator.or_, others, int)


@contextlib.contextmanager
def _logging_to_terminal() -> Iterator[None]:
    """Show what our own code logs, while a command runs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("qlora_lightning")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


_KEYS = """Every key of the YAML is an option: model.rank is --model.rank. The command line counts more than --config.
--model.help and --data.help explain the keys of these two."""
_JUDGED = """The adapter is that of the run folder, unless --ckpt_path or --model.adapter name another; config.yaml in
a run folder is the config of that run."""
_DESCRIPTIONS = {
    "fit": """Train adapters on the quantized base of a config. All results are written to the run folder,
trainer.default_root_dir: adapter, checkpoints, metrics, report. A folder that holds a run is never started over; with
--ckpt_path last it is resumed.""",
    "validate": f"""Report loss, perplexity and token accuracy on the rows of data.val. {_JUDGED}""",
    "test": f"""Report loss, perplexity and token accuracy on the rows of data.test. {_JUDGED}""",
    "predict": f"""Answer the rows of data.predict greedily, into predictions.jsonl in the run folder. {_JUDGED}""",
}
_RUN = "runs/quickstart/config.yaml"
EXAMPLES = {
    "fit": """  qlora-lightning fit --config configs/quickstart.yaml
  qlora-lightning fit --config configs/quickstart.yaml --model.rank 16 --trainer.default_root_dir runs/rank-16
  qlora-lightning fit --config configs/quickstart.yaml --ckpt_path last --trainer.max_epochs 2""",
    "validate": f"  qlora-lightning validate --config {_RUN}",
    "test": f"  qlora-lightning test --config {_RUN} --data.test configs/quickstart/val.jsonl",
    "predict": f"  qlora-lightning predict --config {_RUN} --data.predict configs/quickstart/val.jsonl",
}


class _HelpFormatter(ParagraphFormatter, jsonargparse.DefaultHelpFormatter):
    """jsonargparse's, with our paragraphs."""
