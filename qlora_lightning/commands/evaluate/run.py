"""Loads the base once, and judges it and each adapter on the same rows."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from lightning.pytorch.cli import LightningArgumentParser

from qlora_lightning.callbacks import AdapterCheckpoint, Evaluation
from qlora_lightning.commands import training
from qlora_lightning.commands.config import read_configs, refuse_moved_run
from qlora_lightning.commands.evaluate.options import Options
from qlora_lightning.commands.evaluate.output import report
from qlora_lightning.commands.evaluate.prompts import warn_of_other_prompts
from qlora_lightning.commands.evaluate.rows import read_rows, source_names
from qlora_lightning.commands.options import quiet_lightning
from qlora_lightning.evaluation.comparison import BASE
from qlora_lightning.evaluation.judge import Answering, EvaluationRow, judge_rows, steps_bar
from qlora_lightning.evaluation.scores import Judgement
from qlora_lightning.model.adapters.lora import without_adapters
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import callbacks_of


def _peft_name(place: int) -> str:
    """PEFT's name for an adapter: a user's own may hold what PEFT does not take."""
    return f"adapter_{place}" if place else "default"  # the one that a module is made with


def evaluate(options: Options, arguments: Sequence[str]) -> None:
    """Evaluate, print and write.

    Args:
        options: The command's own.
        arguments: Those of ``fit``.

    Raises:
        UserError: A key, value, adapter or row is wrong.
    """
    with quiet_lightning():
        training.main(["validate", *arguments], functools.partial(_EvaluateCLI, options=options), name="evaluate")


class _EvaluateCLI(training.QLoRACLI):
    """Reads what ``validate`` reads, on one device, and does another thing with it."""

    def __init__(self, *args: Any, options: Options, **kwargs: Any) -> None:
        self._options = options
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = self._parse(parser, args)
        settings = self.config["validate"]
        settings["ckpt_path"] = None
        if not self._options.adapters:  # those of the run folder
            refuse_moved_run(read_configs(args), settings["trainer"]["default_root_dir"])
        alone = {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False, "enable_progress_bar": False}
        for key, value in alone.items():
            settings["trainer"][key] = value

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.validate = self._evaluate  # what LightningCLI calls when all is made
        return trainer

    def before_validate(self) -> None:
        """Find the adapters of the run folder, if none are named."""
        run_folder = AdapterCheckpoint.adapter_folder(self.trainer.default_root_dir)
        self._adapters = self._options.adapters or {"adapter": run_folder}
        if not self._options.adapters and not (run_folder / "adapter_config.json").is_file():
            raise UserError(f"There is no adapter in {run_folder}: name one by --adapter DIR, or run `fit` first.")

    def _evaluate(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        section = next(each for each in callbacks_of(self.trainer) if isinstance(each, Evaluation))
        options = self._options.with_section(section)
        datamodule.trainer = self.trainer
        datamodule.setup("validate" if options.split == "val" else "test")
        limit = self.trainer.limit_val_batches if options.split == "val" else self.trainer.limit_test_batches
        rows = read_rows(datamodule, options.split, options.rows, options.group_by, limit)
        if (of_split := datamodule.reports.get(options.split)) is not None and of_split.shortened:
            say(f"{of_split.describe()}\n  what shortens rows: data.max_length, data.too_long")
        for name, folder in self._adapters.items():
            warn_of_other_prompts(name, folder, getattr(datamodule, "identity", {}))
        asked = [row for row in rows[: options.answered] if row.prompt is not None]
        chosen = (options.scores or "auto", options.max_new_tokens, options.batch_size or len(asked))
        answering = Answering.of(asked, datamodule.tokenizer, datamodule.stop_ids, *chosen) if asked else None
        model.trainer = self.trainer
        _load(model, self._adapters)
        judged = _judge(model, rows, answering, options.answered or 0, self._adapters)
        report(rows, judged, answering, source_names(datamodule, options.split), self._adapters, options)


def _load(module: Any, adapters: Mapping[str, Path]) -> None:
    """Make the model with the first adapter, and put the others beside it."""
    first, *others = adapters.values()
    module.adapter = str(first)
    if not module.overrides("build_model"):  # another one may ask for them
        module.adapter_options = {}  # rank and targets are those of the folders, whatever the config trains
    module.configure_model()
    module.to(module.trainer.strategy.root_device)
    if not isinstance(module.model, peft.PeftModel):
        raise UserError("evaluate needs a model with PEFT's adapters, which this build_model does not make.")
    for place, folder in enumerate(others, start=1):
        module.add_adapter(_peft_name(place), folder)


def _judge(
    module: Any, rows: Sequence[EvaluationRow], answering: Answering | None, answered: int, adapters: Mapping[str, Path]
) -> dict[str, list[Judgement]]:
    steps = (1 + len(adapters)) * (len(rows) + (min(answered, len(rows)) if answering else 0))
    judged = {}
    with steps_bar(f"base and {', '.join(adapters)}", steps) as watch:
        with without_adapters(module.model):
            judged[BASE] = judge_rows(module, rows, answering, answered, watch)
        for place, name in enumerate(adapters):
            module.model.set_adapter(_peft_name(place))
            judged[name] = judge_rows(module, rows, answering, answered, watch)
    return judged
