"""Adapter folders on a command line: their names, and the config of their run or of the folder itself.

Either may come from anybody: of a config that the user has not typed only plain values of a short list count.
"""

import glob
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_adapter_config, read_identity
from qlora_lightning.commands.config import find_configs, read_configs
from qlora_lightning.commands.merge import RECORD
from qlora_lightning.data.rows.sources import kind_of_file
from qlora_lightning.evaluation import BASE
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, load_yaml

# keys of evaluation.json and predictions.jsonl, beside which adapters have names
_RESERVED = (BASE, "served", "difference", "differences", "prompt", "expected", "row", "place", "source")
_RENDERING = ("system", "train_on", "max_length", "too_long")  # of the training, which other rows share
# what counts of a config that nobody has typed
_KEYS = {
    "model": (
        *("class_path", "base", "revision", "quantization", "double_quant", "compute_dtype", "adapter", "fast"),
        *("objective", "beta", "gamma", "label_smoothing", "sft_share"),
        *("desirable_weight", "undesirable_weight"),
    ),
    "data": (
        *("class_path", "train", "val", "test", "val_fraction", "format", "columns", "roles", "system", "encoding"),
        *("chat_template", "template_options", "train_on", "max_length", "too_long", "on_bad_row"),
        *("missing", "deduplicate", "batch_size", "tokens_per_batch", "shuffle", "tokenizer"),
    ),
    "evaluation": ("rows", "max_new_tokens", "scores", "batch_size", "samples", "general", "general_rows"),
    "trainer": ("limit_val_batches", "limit_test_batches", "precision", "accelerator"),
}
_ROWS = ("train", "val", "test", "path", "general")  # files, or a file of a source
_OWN_CLASSES = (
    *("qlora_lightning.QLoRAModule", "qlora_lightning.PreferenceModule"),
    *("qlora_lightning.InstructionDataModule", "qlora_lightning.PreferenceDataModule"),
)
_CODE = ("class_path", "init_args", "optimizer", "trust_remote_code")  # name what is imported, or let it run


def name_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Return adapter folders by name: each value is ``NAME=DIR``, or ``DIR``, which is named after its run folder."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or "/" in name:
            whole, folder = Path(value).expanduser().absolute(), value
            name = (whole.parent if whole.name == ADAPTER_FOLDER else whole).name
        is_shown = equals or len(values) > 1  # a single adapter is called so
        if not name or (is_shown and name in _RESERVED) or name in found:
            raise UserError(f"--adapter {value}: expected DIR or NAME=DIR with a new name, but {name!r} is taken.")
        found[name] = find_adapter_folder(folder)
        if (found[name] / RECORD).is_file():
            raise UserError(
                f"--adapter {value} is a merged model, which needs none: load it with transformers, serve it with "
                f"`vllm serve {folder}`, or run its GGUF file with `llama-cli -m`."
            )
        read_identity(found[name])
    return found


def add_config(adapter: Path | None, arguments: Sequence[str]) -> list[str]:
    """Return options of ``fit`` with the config of an adapter's run in front, unless they name a config themselves."""
    if adapter is None or find_configs(arguments):
        return list(arguments)
    config = adapter.absolute().parent / CONFIG  # of the run folder around it
    settings = _read_run_config(config) if config.is_file() else {}
    if not settings.get("data", {}).keys() & {"train", "val", "test"}:
        if not any(each.startswith("--data") for each in arguments):
            raise UserError(
                f"Nothing names the rows: there is no config.yaml beside the adapter folder {adapter}, or it names no "
                "file of this machine. Add --config FILE or --data.val FILE."
            )
        settings = _settings_of(adapter)
    return ["--config", json.dumps(settings), *arguments]


def _read_run_config(file: Path) -> dict[str, Any]:
    """Return what counts of the config of a run that the user has not named, and report what does not."""
    config, ignored = read_configs(["--config", str(file)])[str(file)], list[str]()
    settings: dict[str, Any] = {}
    for section, keys in _KEYS.items():
        given = config.get(section)
        given = dict(given) if isinstance(given, dict) else {}
        arguments = given.pop("init_args", None)
        given |= arguments if isinstance(arguments, dict) else {}
        plain = {key: value for key, value in given.items() if _is_harmless(value, key)}
        settings[section] = {key: value for key, value in plain.items() if key in keys}
        unread = given.keys() & {*keys, *_CODE} - plain.keys()
        ignored += [f"{section}.{key}: {reprlib.repr(given[key])}" for key in sorted(unread)]
    if type(config.get("seed_everything")) is int:  # which chooses the rows that are held out
        settings["seed_everything"] = config["seed_everything"]
    if ignored:
        say(
            f"{file} is not named by --config, so only plain settings of it count. Ignored: {', '.join(ignored)}. "
            f"If you trust its author, `--config {file}` takes them too."
        )
    return settings


def _is_harmless(value: Any, key: str) -> bool:
    """Whether a setting of a config from elsewhere, with all that is in it, imports no code and asks no network."""
    if isinstance(value, dict):
        return all(_is_harmless(each, key if name == "name" else str(name)) for name, each in value.items())
    if isinstance(value, list):
        return all(_is_harmless(each, key) for each in value)
    if key in _CODE:
        return value in (None, False, *_OWN_CLASSES)
    if not isinstance(value, str) or key == "system":
        return True
    try:  # jsonargparse reads YAML where a setting may have several types
        parsed = load_yaml(value)
    except yaml.YAMLError:
        return False
    if isinstance(parsed, dict | list) or (isinstance(parsed, str) and parsed != value):
        return False
    if key == "format":
        return "." not in value
    if key == "tokenizer":
        return value.startswith("package:") or Path(value).expanduser().is_dir()
    if key in _ROWS:
        is_here = bool(kind_of_file(value)) or glob.has_magic(value) or Path(value).expanduser().exists()
        return is_here and "://" not in value
    return True


def _settings_of(adapter: Path) -> dict[str, Any]:
    """Return what the folder itself holds on its base and on how its rows were rendered, in the form of a config."""
    identity = read_identity(adapter)
    names = ("revision", "quantization", "double_quant")
    model = {name: identity[name] for name in names if identity.get(name) is not None}
    loaded_from = str(read_adapter_config(adapter).get("base_model_name_or_path"))
    base = str(identity.get("base") or loaded_from)
    is_path = identity.get("revision") is None and not base.startswith("package:")  # a hub id has a revision
    is_lost = is_path and not Path(base).expanduser().exists()
    model["base"] = loaded_from if is_lost else base  # a path is relative to where it was trained
    if identity.get("compute_dtype") == "float32":
        model["compute_dtype"] = "fp32"
    trained = (identity.get("data") or {}).get("settings") or {}
    data = {name: trained[name] for name in _RENDERING if trained.get(name) is not None}
    if (adapter / "tokenizer_config.json").is_file():
        data["tokenizer"] = str(adapter)  # with the chat template of the training
    return {"model": model, "data": data}
