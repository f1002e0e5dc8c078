"""The config files of a command line: checked before a second is spent, and the short forms that users type in them."""

import difflib
import inspect
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml

CALLBACK_KEYS = ("gradient_checkpointing", "adapter_checkpoint", "gpu_memory", "throughput", "evaluation", "ema")
Sections = Mapping[str, type | None]
"""The top-level keys of a config, each with the class whose arguments its own keys are."""


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Return what is behind each ``--config`` and ``-c``, as it was typed; a config itself, as JSON, is left out."""
    found, awaited = [], False
    for argument in arguments:
        if awaited:
            found.append(argument)
        elif argument.startswith("--config="):
            found.append(argument.partition("=")[2])
        awaited = not awaited and argument in ("--config", "-c")
    return [name for name in found if not name.startswith("{")]


def read_configs(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the config files that a command line names, by their names as they were typed.

    Raises:
        UserError: a file does not exist, or is no YAML with keys.
    """
    return {name: _read_config(name) for name in find_configs(arguments)}


def _read_config(name: str) -> dict[str, Any]:
    file = Path(name).expanduser()
    if file.is_dir():
        inner = Path(name) / "config.yaml"
        remedy = inner if (file / "config.yaml").is_file() else "a YAML file"
        raise UserError(f"--config {name} is a folder: name {remedy}.")
    try:
        config = load_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--config {name}: no such file. Paths are relative to the current folder.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text in UTF-8: {error.reason} at byte {error.start}.") from error
    except yaml.YAMLError as error:
        fault = str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            fault = f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
        raise UserError(f"{name} is not YAML: {fault}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{name} is empty or no mapping: expected keys such as model, data and trainer.")
    return config


# ---- keys and values -------------------------------------------------------------------------------------------------


def check_keys(arguments: Sequence[str], configs: Mapping[str, Mapping[str, Any]], known: Sections) -> None:
    """Reject keys that nothing reads, with the nearest right one: jsonargparse lets an empty section pass.

    Raises:
        UserError: there is such a key.
    """
    # of a class of the user's own jsonargparse checks the keys
    foreign = {section for config in configs.values() for section in config if _has_class(config[section])}
    foreign |= {word[2:].partition(".")[0] for word in arguments if re.match(r"--\w+\.class_path\b", word)}
    keys = {section: [] if section in foreign else _keys_of(section, owner) for section, owner in known.items()}
    for name, config in configs.items():
        for section, values in config.items():
            _check_key(str(section), known, f"in {name}")
            for key in values if isinstance(values, dict) else ():
                _check_key(f"{section}.{key}", keys[section], f"in {name}")
    for word in arguments:
        section, dot, inner = word.partition("=")[0].removeprefix("--").partition(".")
        if word.startswith("--") and dot:
            _check_key(section, known, "on the command line")
            _check_key(f"{section}.{inner.partition('.')[0]}", keys[section], "on the command line")
        elif word.startswith("--") and difflib.get_close_matches(section, known):  # else it may be a command's own
            _check_key(section, (*known, "help", "print_config"), "on the command line")


def _has_class(values: Any) -> bool:
    return isinstance(values, dict) and "class_path" in values


def _keys_of(section: str, owner: type | None) -> list[str]:
    if owner is None:
        return []
    arguments = [name for name in inspect.signature(owner).parameters if name != "kwargs"]
    return [f"{section}.{name}" for name in (*arguments, "init_args", "class_path", "help")]


def _check_key(key: str, known: Collection[str], place: str) -> None:
    if known and key.rstrip("+") not in known:
        prefix, dot, name = key.rpartition(".")
        near = difflib.get_close_matches(name, [each.removeprefix(prefix + dot) for each in known], n=1, cutoff=0.5)
        hint = f"Did you mean {prefix}{dot}{near[0]}?" if near else f"Keys are {', '.join(known)}."
        raise UserError(f"There is no key {key!r}. {hint} ({place})")


_NOISE = re.compile(
    r"Parser key|Does not validate|Subtypes|Errors|Given value type|Given value: (?:NestedArg|Namespace|\{)"
    r"|Expected an? .*NoneType|Problem with given class_path 'qlora_lightning\."
)


def describe_parse_error(message: str) -> str:
    """Return jsonargparse's own words for a wrong value in one line: its key, what was expected, and what was found."""
    if re.search(r"arguments are required: base", message):
        return (
            "model.base is missing: name a hub id, a folder, a .gguf file or package:NAME, in the YAML or by "
            "--model.base."
        )
    keys = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    lines = [line.strip(" -:") for line in message.splitlines()]
    said = "; ".join(line for line in lines if line and not _NOISE.match(line))
    said = re.sub(r"an? <class '(?:\w+\.)*(\w+)'>", r"\1", said)
    said = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", said)
    return f"{keys}: {said}." if keys else f"{said}."


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return what a constructor of ours raised, which jsonargparse wraps in words of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


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
    for key in CALLBACK_KEYS:
        if key in config and not isinstance(config[key], dict):
            config[key] = {"enabled": bool(config[key])}
    return config


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Expand ``--gpu_memory null`` (or ``false``, ``true``) on the command line, and join ``--key -1e-3`` by ``=``.

    Without it argparse takes ``-1e-3`` for an option, and finds no value for the key.
    """
    expanded: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name.startswith("--") and name[2:] in CALLBACK_KEYS:
            if not equals and rest:
                value, equals = rest.pop(0), "="
            if value.lower() in ("null", "none", "false", "~", "true"):
                name, value = f"{name}.enabled", str(value.lower() == "true").lower()
        elif name.startswith("--") and not equals and rest and _is_negative(rest[0]):
            value, equals = rest.pop(0), "="
        expanded.append(f"{name}{equals}{value}")
    return expanded


def _is_negative(text: str) -> bool:
    try:
        return text.startswith("-") and math.isfinite(float(text))
    except ValueError:
        return False


def shorten_config(config: dict[str, Any], default_classes: Mapping[str, str]) -> dict[str, Any]:
    """Return a config with model and data flat, with a ``class_path`` only if it is not the default one."""
    short = dict(config)
    for key, default in default_classes.items():
        value = dict(short.get(key) or {})
        class_path, flat = value.pop("class_path", default), dict(value.pop("init_args", None) or {})
        short[key] = {**({} if class_path == default else {"class_path": class_path}), **flat, **value}
    return short


# ---- the config of a run ---------------------------------------------------------------------------------------------

_OF_A_RUN = ("manifest.json", "checkpoints/last.ckpt", "adapter/adapter_config.json")


def refuse_moved_run(configs: Mapping[str, Mapping[str, Any]], run_folder: str | Path) -> None:
    """Reject a run's own config that names another folder than its own: the run was moved.

    There would be no checkpoint and no adapter: ``fit`` would start fresh, ``validate`` would judge the base.

    Args:
        configs: as ``read_configs`` returned them.
        run_folder: ``trainer.default_root_dir``, wherever it was set.

    Raises:
        UserError: a config does.
    """
    for name, config in configs.items():
        file = Path(name).expanduser()
        trainer = config.get("trainer")
        named = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
        is_run = file.name == "config.yaml" and any((file.parent / each).exists() for each in _OF_A_RUN)
        if not is_run or not isinstance(named, str) or os.path.expanduser(named) != os.path.expanduser(run_folder):
            continue
        if Path(named).expanduser().resolve() != file.parent.resolve():
            raise UserError(
                f"--config {name} belongs to the run in {file.parent}, but has trainer.default_root_dir: {named}, "
                "which is another folder: the run was moved, or the current folder is another. Add "
                f"`--trainer.default_root_dir {file.parent}` to continue that run, or name another to begin one."
            )
