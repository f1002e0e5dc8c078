"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with our module, data and callbacks."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from qlora_lightning import callbacks
from qlora_lightning.callbacks.adapter_checkpoint import find_checkpoint
from qlora_lightning.callbacks.progress_bar import choose_progress_display
from qlora_lightning.callbacks.run_folder import MetricsLogger, refuse_started_folder
from qlora_lightning.callbacks.stop_signals import was_requeued
from qlora_lightning.commands.config import CALLBACKS, TRAINER_DEFAULTS, expand_arguments, shorten_parse_error
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.sharded import register_strategies
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, load_yaml
from qlora_lightning.support.settings import NUMBERS, check_trainer_settings
from qlora_lightning.support.trainer import is_trial_run, say_once
from qlora_lightning.support.values import check_setting

_CLASSES = {"model": "qlora_lightning.QLoRAModule", "data": "qlora_lightning.InstructionDataModule"}
_CALLBACKS: dict[str, type[Callback]] = {
    key: getattr(callbacks, path.rpartition(".")[2]) for key, path in CALLBACKS.items()
}
_PARSER_MODE = "qlora_yaml"  # the loader of jsonargparse would read the text 1e5 of a config as a number


class _Trainer(Trainer):
    """Lightning's Trainer, of whose limits 1 is one batch and 1.0 all of them."""

    # jsonargparse tries the types of a union in order, and typing's cache holds Lightning's Union[int, float] and
    # Union[float, int] as one: the one that a library created first. With None as the default it would use typing too.

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = 1.0,
        limit_val_batches: int | float | None = 1.0,
        limit_test_batches: int | float | None = 1.0,
        limit_predict_batches: int | float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **kwargs,
        )

    __init__.__doc__ = Trainer.__init__.__doc__  # for --help


class QLoRACLI(LightningCLI):
    """LightningCLI with our keys: parses options of ``fit`` and instantiates the objects; nothing runs before ``run``.

    ``model.configure_model()`` and ``datamodule.setup(stage)`` load base and rows, not this class.

    Args:
        args: the options, without a command in front.
        verb: what to run, ``fit``, ``validate``, ``test`` or ``predict``; without it there is no Trainer, nor its
            loggers, callbacks, plugins and profiler.
    """

    checkpoint: str | None = None  # file of the checkpoint to run with

    def __init__(self, args: Sequence[str], verb: str | None = None) -> None:
        self.verb, self._starts_fresh = verb, False
        self._command = ["qlora-lightning", str(verb), *args]
        configs, options = expand_arguments(args)
        # in front, since the last one wins and an option counts more than a file
        flow: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True}
        args = [*(f"--config={yaml.safe_dump(config, **flow)}" for config in configs), *options]
        register_strategies()
        # as jsonargparse 5 does; and null is checked against the type of its key as any other value, but not where a
        # config is written, of which a null timedelta would become a text
        writes = any(argument.startswith("--print_config") for argument in args)
        jsonargparse.set_parsing_settings(instantiate_subclass_spec_in_any=False, unset_sentinel=not writes)
        jsonargparse.set_loader(_PARSER_MODE, load_yaml, exceptions=(yaml.YAMLError,))
        parser_options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": _PARSER_MODE}
        for section in ("trainer", *_CALLBACKS):  # of model and data jsonargparse has such options
            if f"--{section}.help" in args:
                args = ["--help"]
                parser_options |= {"usage": f"--{section}.KEY VALUE", "description": ""}
                parser_options["formatter_class"] = type("_HelpOfOne", (_SectionHelp,), {"section": section})
        super().__init__(
            QLoRAModule,
            InstructionDataModule,
            trainer_class=_Trainer,
            save_config_callback=None,  # RunFolder writes it
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            parser_kwargs=parser_options,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, kind in _CALLBACKS.items():
            parser.add_lightning_class_args(kind, key)
        checkpoint_help = "checkpoint; `last` is the newest in the run folder"
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=checkpoint_help)
        parser.set_defaults({key: {"class_path": name} for key, name in _CLASSES.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse and check the arguments, and find the checkpoint to run with.

        Lightning's own method would warn that arguments come both from Python and from the command line.
        """
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise UserError(shorten_parse_error(error.message)) from error
        finally:
            jsonargparse.set_parsing_settings(unset_sentinel=False)  # the run folder gets the config
        for section in _CLASSES:
            check_setting(section, None, self.config[section] is not None, "settings, or leave the key out")
        folder = os.path.expanduser(self.config["trainer"]["default_root_dir"] or TRAINER_DEFAULTS["default_root_dir"])
        self.config["trainer"]["default_root_dir"] = folder
        trainer = self.config["trainer"]
        self._max_epochs = trainer["max_epochs"]
        if self._max_epochs is None and trainer["max_steps"] == -1:  # Lightning would train 1,000 epochs
            trainer["max_epochs"] = 1
        check_trainer_settings(trainer)
        seed, bounds = self.config["seed_everything"], NUMBERS["seed_everything"]
        is_valid = isinstance(seed, bool) or seed in bounds  # true chooses a seed, false sets none
        check_setting("seed_everything", seed, is_valid, bounds.expected)
        model = self.config["model"].get("init_args") or {}
        targets = model.get("target_modules")
        if isinstance(targets, str) and re.fullmatch(r"[\w.]+(, ?[\w.]+)+", targets):  # q_proj,v_proj is a list
            model["target_modules"] = re.split(", ?", targets)
        if self.verb is None:
            return
        if self.verb == "fit" and was_requeued():  # it resumes, whatever its command says
            self.checkpoint = find_checkpoint(folder, "last")
        if self.checkpoint is None:
            self.checkpoint = find_checkpoint(folder, self.config["ckpt_path"])
        # `last` of a folder that has none yet
        self._starts_fresh = self.checkpoint is None and self.config["ckpt_path"] is not None
        if self._starts_fresh and self.verb != "fit":
            raise UserError(f"--ckpt_path last: there is no checkpoint in {folder}.")

    def instantiate_classes(self) -> None:
        """Instantiate the classes of the config; without a verb not those of the Trainer, which may need a device."""
        if self.verb is not None:
            super().instantiate_classes()
            return
        settings = self.config.clone()
        for name in ("logger", "callbacks", "plugins", "profiler"):  # they may write, too
            settings["trainer"][name] = None
        instances = self.parser.instantiate_classes(settings)
        self.model, self.datamodule = instances["model"], instances["data"]

    def after_instantiate_classes(self) -> None:
        self.datamodule.take_tokenizer_of_base(self.model)
        self.model.save_hyperparameters({}, logger=False)  # RunFolder gives loggers the whole config

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the Trainer; ``fit`` also logs to ``metrics.csv``, unless ``logger`` is false."""
        settings, config = self.config_init["trainer"], self.short_config()
        loggers, configured = (_as_list(settings[name]) for name in ("logger", "callbacks"))
        if self.verb == "fit":
            loggers = [MetricsLogger(settings["default_root_dir"]), *loggers]
        if settings["logger"] is False or settings["fast_dev_run"]:
            loggers = []
        present = (*map(type, configured), *_CALLBACKS.values())  # those with a key are made of the config
        if settings["fast_dev_run"]:  # which writes nothing
            present = (*present, callbacks.PredictionWriter)
        defaults = callbacks.default_callbacks(config=config, command=self._command)
        added = [default for default in defaults if not any(issubclass(kind, type(default)) for kind in present)]
        shows_progress = settings["enable_progress_bar"] in (None, True)
        if shows_progress and not any(isinstance(callback, ProgressBar) for callback in configured):
            added.append(choose_progress_display())
        try:
            return super().instantiate_trainer(logger=loggers, callbacks=[*configured, *added], **kwargs)
        except (TypeError, ValueError, MisconfigurationException) as error:  # Lightning rejects a setting
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def short_config(self) -> dict[str, Any]:
        """Return the config as users write it: model and data flat, with a ``class_path`` only if it is not ours."""
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        for key in ("config", "ckpt_path"):
            config.pop(key, None)
        config["trainer"]["max_epochs"] = self._max_epochs  # of null a later --trainer.max_steps lifts the limit
        for key, default in _CLASSES.items():
            class_path, settings = config[key]["class_path"], config[key].get("init_args") or {}
            config[key] = settings if class_path == default else {"class_path": class_path, **settings}
        config["data"].pop("accept_changed_data", None)  # it is for one resume: the next one asks again
        return config

    def run(self) -> None:
        """Train, or evaluate what was trained, with the Trainer's method that ``verb`` names."""
        if self.verb != "fit":
            self._take_trained_adapter()
        elif self._starts_fresh:
            say_once("No checkpoint in the run folder yet: this starts fresh.")
        elif self.trainer.is_global_zero and not is_trial_run(self.trainer):
            refuse_started_folder(self.trainer.default_root_dir, self.checkpoint, table=True)
        try:
            getattr(self.trainer, str(self.verb))(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint)
        except MisconfigurationException as error:  # Lightning rejects a setting
            raise UserError(f"trainer: {' '.join(str(error).split())}", "trainer") from error

    @property
    def names_adapter(self) -> bool:
        """Whether the command line names an adapter folder, and not a config alone."""
        options = ("--model.adapter", "--model.init_args.adapter")
        return any(argument.partition("=")[0] in options for argument in self._command)

    def _take_trained_adapter(self) -> None:
        """Take the run folder's adapter unless the user names another: a new one would evaluate the base unnoticed."""
        if self.checkpoint is not None or self.names_adapter:
            return
        folder = Path(self.trainer.default_root_dir) / ADAPTER_FOLDER
        if (folder / "adapter_config.json").exists():
            say_once(f"Adapter: {folder}")
            self.model.adapter = str(folder)
        elif self.model.adapter is None:
            say_once(
                "No --ckpt_path, no model.adapter and no adapter in the run folder: this evaluates the base alone."
            )


class _SectionHelp(jsonargparse.DefaultHelpFormatter):
    """jsonargparse's help, of the keys of one section alone."""

    section: str

    def add_arguments(self, actions: Any) -> None:
        super().add_arguments([action for action in actions if action.dest.startswith(f"{self.section}.")])


def _as_list(value: Any) -> list[Any]:
    """Return a setting of the Trainer that takes one object, several, or a switch, as a list of objects."""
    if value in (None, True, False):
        return []
    return value if isinstance(value, list) else [value]


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` begins with; return the exit code."""
    verb, *options = argv
    QLoRACLI(options, verb).run()
    return 0
