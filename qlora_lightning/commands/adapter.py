"""Adapter folders on a command line, which may come from strangers: their names, and the config of their runs."""

import glob
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.commands.config import find_configs, read_config
from qlora_lightning.data.rows.files import kind_of_file
from qlora_lightning.evaluation import BASE, SERVED
from qlora_lightning.sources import folders
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError, bounded
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, load_yaml

_RENDERING = (  # of the training; other rows share them
    *("system", "train_on", "max_length", "too_long", "on_bad_row", "deduplicate"),
    *("batch_size", "tokens_per_batch"),
)
_FUNCTIONS = ("format", "scores")
_ROWS, _FILES = ("train", "val", "test"), ("train", "val", "test", "forgetting")
_COUNTED = {  # of the config of a run; base and quantization are those that the adapter folder records
    "model": ("class_path", "objective", "beta", "gamma", "sft_share"),
    "data": (
        *(*_ROWS, "class_path", "val_fraction", "format", "columns", "roles"),
        *("encoding", "drop_answers", "template_options", *_RENDERING),
    ),
    "evaluation": ("rows", "max_new_tokens", "scores", "samples", "forgetting", "forgetting_rows"),
    "trainer": ("accelerator", "limit_val_batches", "limit_test_batches"),
}


def name_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Return adapter folders by name: each value is ``NAME=DIR``, or ``DIR``, which is named after its run folder."""
    adapters: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or "/" in name:
            path, folder = Path(value).expanduser().absolute(), value
            name = (path.parent if path.name == ADAPTER_FOLDER else path).name
        if not name or name in (BASE, SERVED, *adapters):  # the sides of an evaluation
            raise UserError(f"--adapter {value}: expected DIR or NAME=DIR with a new name, but {name!r} is taken.")
        adapters[name] = folders.find_adapter_folder(folder)
        folders.read_identity(adapters[name])
    return adapters


# ---- the config of its run -------------------------------------------------------------------------------------------


def add_config(adapter: Path | None, arguments: Sequence[str]) -> list[str]:
    """Return options of ``fit`` with the config of an adapter's run in front, unless they name a config themselves."""
    if adapter is None or find_configs(arguments):
        return list(arguments)
    config = adapter.absolute().parent / CONFIG  # of the run folder around it
    with bounded(f"{config} cannot be read", CONFIG, explains=True):  # a few lines may expand to billions of values
        settings = _read_run_config(config) if config.is_file() else {}
        json.dumps(settings)
    for name, section in _read_adapter_settings(adapter).items():
        settings[name] = {**settings.get(name, {}), **section}
    if not settings["data"].keys() & {*_ROWS} and not any(argument.startswith("--data") for argument in arguments):
        raise UserError(
            f"Nothing names the rows: there is no config.yaml beside the adapter folder {adapter}, it was not taken, "
            "or it names no file of this machine. Add --config FILE or --data.val FILE."
        )
    return ["--config", json.dumps(settings), *arguments]


def _read_run_config(file: Path) -> dict[str, Any]:
    """Return what counts of the config of a run that the user has not named; nothing if that would run or fetch."""
    config, settings = read_config(str(file)), dict[str, Any]()
    for name, keys in _COUNTED.items():
        if isinstance(section := config.get(name), dict):
            settings[name] = {key: section[key] for key in keys if key in section}
    faults = [
        f"{name}.{key}: {reprlib.repr(value)}"
        for name, section in settings.items()
        for key, value in section.items()
        if not _is_plain(value, key)
    ]
    if faults:
        say(
            f"{file} is not named by --config, and not taken, since it would run code or fetch rows: "
            f"{', '.join(faults)}. If you trust its author, `--config {file}` takes it."
        )
        return {}
    seed = config.get("seed_everything")  # chooses the held-out rows
    return {**settings, "seed_everything": seed} if isinstance(seed, int) else settings


def _is_plain(value: Any, key: str) -> bool:
    """Whether a setting of a config from elsewhere, nested values included, is plain, and its rows are local."""
    if isinstance(value, dict):  # elsewhere it might name a class
        is_known = key in (*_FILES, "columns", "roles", "template_options")
        return is_known and all(_is_plain(item, name if key in _FILES else key) for name, item in value.items())
    if isinstance(value, list):
        return all(_is_plain(item, key) for item in value)
    if not isinstance(value, str) or key == "system":
        return True
    try:  # jsonargparse parses YAML in a setting of several types
        parsed = load_yaml(value)
    except yaml.YAMLError:
        return False
    if isinstance(parsed, dict | list | str) and parsed != value:
        return False
    if key in (*_FILES, "path"):
        may_be_hub_id = value.count("/") == 1 and not value.startswith(("/", ".", "~"))
        is_local = bool(kind_of_file(value)) or glob.has_magic(value) or Path(value).expanduser().exists()
        return "://" not in value and (is_local or not may_be_hub_id)  # a missing folder is reported as missing
    # a format or a score may be a function
    return value.startswith("qlora_lightning.") if key == "class_path" else key not in _FUNCTIONS or "." not in value


def _read_adapter_settings(adapter: Path) -> dict[str, Any]:
    """Return the base and the rendering of rows that the adapter folder itself records, in the form of a config."""
    identity = folders.read_identity(adapter)
    names = ("revision", "quantization", "double_quant")
    model = {name: identity[name] for name in names if identity.get(name) is not None}
    model["base"] = identity.get("base") or folders.read_adapter_config(adapter).get("base_model_name_or_path")
    if identity.get("compute_dtype") == "float32":
        model["compute_dtype"] = "fp32"
    rendering = (identity.get("data") or {}).get("settings") or {}
    data = {name: rendering[name] for name in _RENDERING if rendering.get(name) is not None}
    if (adapter / "tokenizer_config.json").is_file():
        data["tokenizer"] = str(adapter)  # with the chat template of the training
    return {"model": model, "data": data}
