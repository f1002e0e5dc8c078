"""``--help`` of ``fit``, ``validate``, ``test`` and ``predict``: our keys in a line each, without importing a class."""

import argparse
import ast
import json
import re
from typing import NamedTuple

import docstring_parser

from qlora_lightning.commands.config import SECTIONS, TRAINER_DEFAULTS, read_arguments, read_class

_FIRST_KEYS = (
    *("model.base", "model.quantization", "model.rank", "model.learning_rate"),
    *("data.train", "data.val", "data.batch_size", "data.max_length"),
    *("trainer.default_root_dir", "trainer.max_epochs"),
)
_KEYS = """Every YAML key is also an option: model.rank is --model.rank. Options override --config.
Each key is listed with its default. Set a callback to null or false to turn it off. A * marks the ten keys to start
with. To read about the keys of a section in full, use --model.help, --data.help, --evaluation.help, --trainer.help."""
_OF_TRAINER = {
    "default_root_dir": "Run folder for all results",
    "enable_model_summary": "Print Lightning's table of modules, which counts bytes of packed weights as parameters",
    "gradient_clip_val": "Maximum gradient norm; `null` or 0 turns clipping off",
    "log_every_n_steps": "Log every N optimizer steps",
    "max_epochs": "Maximum epochs; `null` means 1, or no limit if `max_steps` is set",
    "max_steps": "Maximum optimizer steps; -1 means no limit",
}
_ADAPTER = "It uses the adapter of the run folder,\nunless you pass --ckpt_path or --model.adapter."
_DESCRIPTIONS = {
    "fit": """Train adapters on a quantized base. All results are written to the run folder, trainer.default_root_dir.
A folder that already holds a run is never overwritten: pass --ckpt_path last to resume it.""",
    "validate": f"Report loss, perplexity and token accuracy on the rows of data.val. {_ADAPTER}",
    "test": f"Report loss, perplexity and token accuracy on the rows of data.test. {_ADAPTER}",
    "predict": f"Generate greedily for the rows of data.predict, into predictions.jsonl in the run folder. {_ADAPTER}",
}
_RUN = "--config runs/quickstart/config.yaml"
_EXAMPLES = {
    "fit": """  qlora-lightning fit --config configs/quickstart.yaml
  qlora-lightning fit --config configs/quickstart.yaml --model.rank 16 --trainer.default_root_dir runs/rank-16
  qlora-lightning fit --config configs/quickstart.yaml --ckpt_path last --trainer.max_epochs 2""",
    "validate": f"  qlora-lightning validate {_RUN}",
    "test": f"  qlora-lightning test {_RUN} --data.test configs/quickstart/val.jsonl",
    "predict": f"  qlora-lightning predict {_RUN} --data.predict configs/quickstart/val.jsonl",
}


class Key(NamedTuple):
    """A key of a config, with its default as in YAML and the first sentence of its meaning."""

    name: str
    default: str
    meaning: str


def describe_keys(section: str, path: str) -> list[Key]:
    """Describe the keys of a section from the signature and the docstring of its class.

    For Lightning's Trainer, list only ``max_steps`` and the keys whose default or meaning is ours.
    """
    if section == "trainer":
        defaults = {"max_epochs": None, "max_steps": -1, **TRAINER_DEFAULTS}
        return [Key(f"trainer.{name}", _as_yaml(defaults[name]), meaning) for name, meaning in _OF_TRAINER.items()]
    source = read_class(path)
    parameters = docstring_parser.parse(ast.get_docstring(source) or "").params
    meanings = {parameter.arg_name: parameter.description for parameter in parameters}
    return [
        Key(
            f"{section}.{argument.arg}",
            "required" if default is None else _as_yaml(ast.literal_eval(default)),
            _first_sentence(meanings[argument.arg] or ""),
        )
        for argument, default in read_arguments(source)
    ]


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _first_sentence(text: str) -> str:
    first = re.split(r"\. (?=[A-Z]|`(?!None))", " ".join(text.split()).replace("``", "`"))[0].rstrip(".")
    first = first.replace("`None`", "`null`").replace("`False`", "`false`")
    return first[0].upper() + first[1:]


def show_help(verb: str) -> None:
    """Print the help of ``fit``, ``validate``, ``test`` or ``predict``, and exit."""
    parser = argparse.ArgumentParser(
        prog=f"qlora-lightning {verb}",
        usage=f"qlora-lightning {verb} --config FILE [--KEY.NAME VALUE …]",
        description=f"{_DESCRIPTIONS[verb]}\n\nexamples:\n{_EXAMPLES[verb]}\n\n{_KEYS}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36),
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML config; repeat to merge several")
    parser.add_argument("--ckpt_path", metavar="FILE", help="checkpoint; `last` is the newest in the run folder")
    parser.add_argument("--seed_everything", metavar="42", help="seed for rows, adapter and dropout")
    parser.add_argument("--print_config", action="store_true", help="print the config with all defaults and exit")
    for section, path in SECTIONS.items():
        title = (ast.get_docstring(read_class(path)) or "").partition("\n")[0].rstrip(".").replace("``", "`")
        title = "Lightning's Trainer; --trainer.help lists all of its keys" if section == "trainer" else title
        group = parser.add_argument_group(section, title)
        for key in describe_keys(section, path):
            mark = "* " if key.name in _FIRST_KEYS else ""
            text = f"{mark}{key.meaning}".replace("%", "%%")
            group.add_argument(f"--{key.name}", metavar=key.default, help=text)
    parser.parse_args(["--help"])
