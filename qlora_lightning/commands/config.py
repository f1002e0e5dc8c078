"""The config files of a command line: checked before a second is spent, and the short forms that users type in them."""

import difflib
import inspect
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import CONFIG, MANIFEST, load_yaml

CALLBACKS = {
    "gradient_checkpointing": "GradientCheckpointing",
    "adapter_checkpoint": "AdapterCheckpoint",
    "gpu_memory": "GPUMemoryMonitor",
    "throughput": "ThroughputMonitor",
    "evaluation": "Evaluation",
}
"""Callbacks with a key of their own, by the names of their classes: ``inspect`` imports none of them."""
METHOD_KEYS = ("ckpt_path", "weights_only", "verbose", "return_predictions")
"""Arguments of the Trainer's methods."""
_KEYS = ("seed_everything", "model", "data", "trainer", *CALLBACKS, *METHOD_KEYS, "config", "print_config", "help")
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

    Args:
        arguments: the command line.
        configs: the config files that it names.
        classes: sections of a config, each with the class whose arguments its keys are.
    """
    typed = [("on the command line", word[2:].partition("=")[0]) for word in arguments if word.startswith("--")]
    # what is like no key is left to the parser
    typed = [(origin, key) for origin, key in typed if "." in key or difflib.get_close_matches(key, _KEYS)]
    for name, config in configs.items():
        for section, values in config.items():
            keys = values if isinstance(values, dict) else ()
            typed += [(f"in {name}", str(section)), *((f"in {name}", f"{section}.{key}") for key in keys)]
    # jsonargparse checks the keys of a class of the user's own
    foreign = {key.partition(".")[0] for _, key in typed if re.match(r"\w+\.class_path\b", key)}
    known = {section: {*inspect.signature(kind).parameters} - {"kwargs"} for section, kind in classes.items()}
    # of a name in several sections the first counts
    elsewhere = {name: f"{section}.{name}" for section in reversed(known) for name in known[section]} | _OTHER_NAMES
    for origin, key in typed:
        section, dot, rest = key.partition(".")
        _check_key("", section, _KEYS, origin, elsewhere)
        if dot and section in known and section not in foreign:
            names = known[section] | {"init_args", "class_path", "help"}
            _check_key(f"{section}.", rest.partition(".")[0], names, origin, elsewhere)


def _check_key(section: str, key: str, known: Collection[str], origin: str, elsewhere: Mapping[str, str]) -> None:
    if key.rstrip("+") not in known:
        near = elsewhere.get(key) or next((section + name for name in difflib.get_close_matches(key, known, n=1)), None)
        hint = f"Did you mean {near}?" if near else f"Keys are {', '.join(sorted(known))}."
        raise UserError(f"There is no key {section + key!r}. {hint} ({origin})")


def shorten_parse_error(message: str) -> str:
    """Return jsonargparse's words for a wrong value in one line: its key, the innermost reason, and the value."""
    keys, lines = ".".join(re.findall(r'Parser key "([\w.]+)"', message)), message.splitlines()
    reason = max(lines, key=lambda line: len(line) - len(line.lstrip(" -")))  # indented most
    number = lines.index(reason)
    values = [line.strip() for line in lines[number:] if line.strip().startswith("Given value:")]
    words = [reason.strip(" -")]
    if number and "Problem with given class_path" in lines[number - 1]:
        words.insert(0, lines[number - 1].strip(" -:"))
    elif "Got value" not in reason:
        words += values[:1]
    text = re.sub(r"an? <class '([\w.]+)'>", r"\1", ". ".join(words))
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    return f"{keys}: {text}.{' 4 bits are nf4.' if text.endswith('4bit') else ''}".removeprefix(": ")


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


def refuse_moved_run(configs: Mapping[str, Mapping[str, Any]], run_folder: str | Path) -> None:
    """Reject a run's own config that names another folder than its own: the run was moved.

    There would be no checkpoint and no adapter: ``fit`` would start fresh, ``validate`` would evaluate the base.
    ``run_folder`` is ``trainer.default_root_dir``, wherever it was set.
    """
    for name, config in configs.items():
        folder = Path(name).expanduser().parent
        trainer = config.get("trainer")
        named = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
        is_run = Path(name).name == CONFIG and (folder / MANIFEST).exists()
        if not is_run or not isinstance(named, str) or _normalize(named) != _normalize(run_folder):
            continue
        if Path(named).expanduser().resolve() != folder.resolve():
            raise UserError(
                f"--config {name} belongs to the run in {folder}, but has trainer.default_root_dir: {named}, which is "
                "another folder: the run was moved, or the current folder is another. Add "
                f"`--trainer.default_root_dir {folder}` to continue that run, or name another to begin one."
            )


def _normalize(path: str | Path) -> str:
    return os.path.normpath(os.path.expanduser(path))
