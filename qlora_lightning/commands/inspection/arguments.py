"""What is typed after ``qlora-lightning inspect``: options of its own, and the config of ``fit``."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse
import yaml

from qlora_lightning.commands.config import (
    CALLBACKS,
    METHOD_KEYS,
    check_keys,
    expand_arguments,
    expand_config,
    read_configs,
)
from qlora_lightning.commands.options import OptionParser
from qlora_lightning.data.chat.tokenizer import tokenizer_of_base
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml

SPLITS = ("train", "val", "test", "predict")
_PARSER_MODE = "qlora_inspect_yaml"
# Sections that other commands read: taken as they are, so that nothing of a model is imported.
_UNTYPED = ("model", "trainer", *CALLBACKS)
_DESCRIPTION = """Report on the data of a config and show rows as the model sees them. No model is loaded.

The config is the one that `fit` takes; a run folder's config.yaml works too. Every key of it can be given
on the command line, as for `fit`: --data.max_length 512, --trainer.devices 4."""
_EPILOG = """examples:
  qlora-lightning inspect --config configs/quickstart.yaml
  qlora-lightning inspect --config configs/quickstart.yaml --row 17 --row 23
  qlora-lightning inspect --config configs/quickstart.yaml --split val --longest --html data.html

Exit code 2: there are bad rows, and `on_bad_row: error` would stop `fit` at them."""


@dataclass(frozen=True)
class Config:
    """The parts of a config that data depend on.

    Attributes:
        name: The config files as they were typed.
        data: Class path and arguments of the data module.
        model: The model section, unchecked.
        trainer: The trainer section, unchecked.
        seed: What ``seed_everything`` says.
    """

    name: str
    data: Any
    model: dict[str, Any]
    trainer: dict[str, Any]
    seed: int | bool


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Parse the command's own options, and the config that the others make up."""
    parser = OptionParser(
        "inspect", _DESCRIPTION, _EPILOG, "qlora-lightning inspect --config FILE [options] [--data.KEY VALUE …]"
    )
    add = parser.add_argument
    add("--split", choices=SPLITS, help="report on this split only (default: all; rows are shown from train)")
    add(
        "--row",
        action="append",
        default=[],
        metavar="N",
        help="show the row that begins in line N of its file, from 1, as messages name it (row N of .parquet and "
        "hub data); FILE:N if a split has several files; may be repeated",
    )
    add("--longest", action="store_true", help="show the longest row")
    add("--shortest", action="store_true", help="show the shortest row")
    add("--search", metavar="TEXT", help="show rows whose text holds TEXT in upper or lower case, and count them")
    add("--html", metavar="FILE", help="write all this as a self-contained page, too")
    add("--force", action="store_true", help="overwrite what --html names, if it is no page of this command")
    own, rest = parser.parse_known_args(argv)
    return own, _parse_config(rest, vars(own))


def make_data_module(config: Config) -> InstructionDataModule:
    """Make the data module as ``fit`` would, with the base's tokenizer unless the config names one."""
    settings = config.data.init_args
    if settings.get("tokenizer") is None:
        if not config.model.get("base"):
            raise UserError(
                "model.base is missing: the data are rendered with its tokenizer. Name a hub id, a folder, a .gguf "
                "file or package:NAME, or name a tokenizer in data.tokenizer."
            )
        revision, trusted = config.model.get("revision"), config.model.get("trust_remote_code") is True
        settings["tokenizer"] = tokenizer_of_base(config.model["base"], revision, trusted)
    made = _config_parser().instantiate(jsonargparse.Namespace(data=config.data))  # type: ignore[no-untyped-call]
    data: InstructionDataModule = made.data
    return data


def _parse_config(arguments: Sequence[str], own: Iterable[str]) -> Config:
    check_keys(arguments, read_configs(arguments), {"data": InstructionDataModule}, own)
    jsonargparse.set_loader(_PARSER_MODE, lambda text: expand_config(load_yaml(text)), exceptions=(yaml.YAMLError,))
    found = _config_parser().parse_args(expand_arguments(arguments))
    names = ", ".join(str(path) for path in found.config or ())
    return Config(names, found.data, found.model, found.trainer, found.seed_everything)


def _config_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode=_PARSER_MODE)
    parser.add_argument("--config", "-c", action="config")
    parser.add_argument("--seed_everything", type=bool | int, default=42)
    for key in _UNTYPED:
        parser.add_argument(f"--{key}", type=dict[str, Any], default={})
    for key in METHOD_KEYS:
        parser.add_argument(f"--{key}", type=Any)
    parser.add_subclass_arguments(InstructionDataModule, "data", required=False)
    parser.set_defaults(data={"class_path": "qlora_lightning.InstructionDataModule"})
    return parser
