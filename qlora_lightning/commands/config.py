"""The config files of a command line: checked before a second is spent, and the short forms that users type in them."""

import difflib
import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml

CALLBACKS = {
    "gradient_checkpointing": "GradientCheckpointing",
    "adapter_checkpoint": "AdapterCheckpoint",
    "gpu_memory": "GPUMemoryMonitor",
    "throughput": "ThroughputMonitor",
    "evaluation": "Evaluation",
}
"""Callbacks with a key of their own, by the names of their classes: ``inspect`` imports none of them."""
_KEYS = ("seed_everything", "model", "data", "trainer", *CALLBACKS, "ckpt_path", "config", "print_config", "help")
_CLASS_KEYS = ("class_path", "init_args", "help")
_OTHER_NAMES = {"gpus": "trainer.devices", "epochs": "trainer.max_epochs", "lr": "model.learning_rate"}  # of peers


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Return what is behind each ``--config`` and ``-c``, as it was typed; a config itself, as JSON, is left out."""
    found = [name for option, name in itertools.pairwise(arguments) if option in ("--config", "-c")]
    found += [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    return [name for name in found if not name.startswith("{")]


def read_configs(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the config files that a command line names, by their names as they were typed."""
    for option, name in itertools.pairwise(arguments):
        is_alone = not name.startswith("-") and not option.startswith("-") and option != "copy"
        if is_alone and name.endswith((".yaml", ".yml")):
            raise UserError(f"{name} stands alone: a config is named as --config {name}.")
    return {name: _read_config(name) for name in find_configs(arguments)}


def _read_config(name: str) -> dict[str, Any]:
    try:
        config = load_yaml(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        from qlora_lightning.commands.recipes import recipes_folder  # here: nobody else waits for its imports

        is_recipe = (recipes_folder() / f"{name}.yaml").is_file()
        hint = f" `qlora-lightning recipes copy {name}` writes the recipe." if is_recipe else ""
        raise UserError(
            f"--config {name}: {str(error.strerror).lower()}. Paths are relative to the current folder.{hint}"
        ) from error
    except (UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{name} is empty or no mapping: expected keys such as model, data and trainer.")
    return config


# ---- keys and values -------------------------------------------------------------------------------------------------


def check_keys(arguments: Sequence[str], configs: Mapping[str, Mapping[str, Any]], classes: Mapping[str, type]) -> None:
    """Reject keys that nothing reads, with the nearest right one: jsonargparse lets an empty section pass.

    ``configs`` are the files that the command line names, ``classes`` have the keys of a section as arguments.
    """
    typed = [(word[2:].partition("=")[0], "on the command line") for word in arguments if word.startswith("--")]
    for name, config in configs.items():
        typed += [(str(section), f"in {name}") for section in config]
        for section, values in config.items():
            typed += [(f"{section}.{key}", f"in {name}") for key in (values if isinstance(values, dict) else ())]
    typed = [(".".join(key.rstrip("+").split(".")[:2]), origin) for key, origin in typed]
    keys = {section: [*inspect.signature(kind).parameters, *_CLASS_KEYS] for section, kind in classes.items()}
    known = [*_KEYS, *(f"{section}.{key}" for section, names in keys.items() for key in names)]
    # jsonargparse checks the keys of a class of the user's own
    foreign = {key.partition(".")[0] for key, _ in typed if key.endswith(".class_path")}
    for key, origin in typed:
        section, dot, name = key.partition(".")
        if key in known or (dot and section in foreign):
            continue
        alias = _OTHER_NAMES.get(name or section)
        elsewhere = [each for each in known if each.endswith(f".{name or section}")]
        near = [alias] if alias else elsewhere or difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"There is no key {key!r}.{hint} ({origin})")


def shorten_parse_error(message: str) -> str:
    """Return jsonargparse's words for a wrong value in one line: its key, the innermost reason, and the value."""
    keys = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    reason = max(message.splitlines(), key=lambda line: len(line) - len(line.lstrip(" -")))  # indented most
    # not of our own classes, whose values are all settings
    details = re.findall(
        r"Problem with given class_path '(?!qlora_lightning).*'|Given value: (?!Nested|Name).*", message
    )
    text = ". ".join([reason.strip(" -"), *details[-1:]])
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", re.sub(r"an? <class '([\w.]+)'>", r"\1", text))
    return f"{keys}: {text}.".removeprefix(": ")


# ---- short forms -----------------------------------------------------------------------------------------------------


def expand_config(config: Any) -> Any:
    """Expand a parsed YAML file: keys beside a ``class_path``, and ``null`` or ``false`` for a callback.

    Anything that is not a whole config (jsonargparse loads single values the same way) is returned as it is.
    """
    if not isinstance(config, dict):
        return config
    for key in ("model", "data"):
        value = config.get(key)
        if isinstance(value, dict) and "class_path" in value:
            beside = {name: value.pop(name) for name in list(value) if name not in ("class_path", "init_args")}
            if beside:
                value["init_args"] = {**beside, **value.get("init_args", {})}
    for key in CALLBACKS:
        if key in config and (config[key] is None or isinstance(config[key], bool)):
            config[key] = {"enabled": bool(config[key])}
    return config


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Expand ``--gpu_memory null`` (or ``false``, ``true``) on the command line, as ``expand_config`` does in YAML."""
    expanded: list[str] = []
    options = {f"--{key}" for key in CALLBACKS}
    for word in arguments:
        if expanded and expanded[-1] in options:
            word = f"{expanded.pop()}={word}"
        name, _, value = word.partition("=")
        if name in options and value.lower() in ("null", "false", "true"):
            word = f"{name}.enabled={str(value.lower() == 'true').lower()}"
        expanded.append(word)
    return expanded
