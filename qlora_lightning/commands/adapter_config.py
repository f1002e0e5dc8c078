"""Adapter folders on a command line: their names, and the config of their run or of the folder itself.

Either may come from anybody: a config that the user has not named is taken only if it holds plain values alone.
"""

import glob
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_adapter_config, read_identity
from qlora_lightning.commands.config import find_configs, read_config
from qlora_lightning.commands.merge import RECORD
from qlora_lightning.data.rows.sources import kind_of_file
from qlora_lightning.evaluation import BASE
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, MANIFEST, load_yaml, read_json_object

_RESERVED = (BASE, "served")  # sides of an evaluation, beside which adapters have names
_RENDERING = ("system", "train_on", "reasoning", "max_length", "too_long")  # of the training, which other rows share
_LIMITS = ("limit_val_batches", "limit_test_batches", "precision", "accelerator")  # of a run's trainer
_ROWS = ("train", "val", "test", "path", "general")  # files, or a file of a source
_CODE = ("class_path", "init_args", "optimizer", "trust_remote_code")  # name what is imported, or let it run


def name_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Return adapter folders by name: each value is ``NAME=DIR``, or ``DIR``, which is named after its run folder."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or "/" in name:
            whole, folder = Path(value).expanduser().absolute(), value
            name = (whole.parent if whole.name == ADAPTER_FOLDER else whole).name
        if not name or name in _RESERVED or name in found:
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
    """Return the config of a run that the user has not named; nothing if it would run code or fetch rows."""
    config = read_config(str(file))
    sections = {name: config.get(name) for name in ("model", "data", "evaluation", "trainer")}
    settings = {name: dict(section) for name, section in sections.items() if isinstance(section, dict)}
    settings["trainer"] = {name: value for name, value in settings.get("trainer", {}).items() if name in _LIMITS}
    settings.get("model", {}).pop("optimizer", None)  # of the training alone
    faults = [
        f"{name}.{key}: {reprlib.repr(value)}"
        for name, section in settings.items()
        for key, value in section.items()
        if not _is_harmless(value, key)
    ]
    if faults:
        say(
            f"{file} is not named by --config, and not taken, since it would run code or fetch rows: "
            f"{', '.join(faults)}. If you trust its author, `--config {file}` takes it."
        )
        return {}
    seed = config.get("seed_everything")  # which chooses the rows that are held out
    manifest = file.with_name(MANIFEST)
    if manifest.is_file():  # a resume with another seed has kept those of the first start
        seed = read_json_object(manifest, "Pass --config.").get("seed", seed)
    return {**settings, "seed_everything": seed} if type(seed) is int else settings


def _is_harmless(value: Any, key: str) -> bool:
    """Whether a setting of a config from elsewhere, with all that is in it, imports no code and fetches no rows."""
    if isinstance(value, dict):
        return all(_is_harmless(each, name) for name, each in value.items())
    if isinstance(value, list):
        return all(_is_harmless(each, key) for each in value)
    if key in _CODE:
        return value in (None, False) or (key == "class_path" and str(value).startswith("qlora_lightning."))
    if not isinstance(value, str) or key == "system":
        return True
    try:  # jsonargparse reads YAML where a setting may have several types
        parsed = load_yaml(value)
    except yaml.YAMLError:
        return False
    if isinstance(parsed, dict | list | str) and parsed != value:
        return False
    if key in _ROWS:
        may_be_of_hub = value.count("/") == 1 and not value.startswith(("/", ".", "~"))
        is_here = bool(kind_of_file(value)) or glob.has_magic(value) or Path(value).expanduser().exists()
        return "://" not in value and (is_here or not may_be_of_hub)  # a missing folder is reported as that
    return key != "format" or "." not in value


def _settings_of(adapter: Path) -> dict[str, Any]:
    """Return what the folder itself holds on its base and on how its rows were rendered, in the form of a config."""
    identity = read_identity(adapter)
    names = ("revision", "quantization", "double_quant")
    model = {name: identity[name] for name in names if identity.get(name) is not None}
    model["base"] = identity.get("base") or read_adapter_config(adapter).get("base_model_name_or_path")
    if identity.get("compute_dtype") == "float32":
        model["compute_dtype"] = "fp32"
    trained = (identity.get("data") or {}).get("settings") or {}
    data = {name: trained[name] for name in _RENDERING if trained.get(name) is not None}
    if (adapter / "tokenizer_config.json").is_file():
        data["tokenizer"] = str(adapter)  # with the chat template of the training
    return {"model": model, "data": data}
