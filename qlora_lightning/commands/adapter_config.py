"""Adapter folders on a command line: their names, and the config of their run or of the folder itself.

Either may come from anybody: of a config that the user has not typed only plain values of a short list count.
"""

import glob
import json
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_adapter_config, read_identity
from qlora_lightning.commands.config import find_configs, read_configs
from qlora_lightning.commands.merge import RECORD
from qlora_lightning.data.rows.sources import kind_of_file
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, load_yaml

BASE = "base"  # the side without an adapter
_RENDERING = ("system", "train_on", "max_length", "too_long")  # settings of the training that other rows share
# what counts of a config that nobody has typed
_KEYS = {
    "model": (
        *("class_path", "base", "revision", "quantization", "double_quant", "compute_dtype", "adapter", "fast"),
        *("objective", "beta", "gamma", "label_smoothing", "sft_share"),
        *("desirable_weight", "undesirable_weight"),
    ),
    "data": (
        *("class_path", "train", "val", "test", "val_fraction", "format", "columns", "roles", "system", "encoding"),
        *("chat_template", "template_options", "reasoning", "train_on", "max_length", "too_long", "on_bad_row"),
        *("deduplicate", "batch_size", "tokens_per_batch", "shuffle", "tokenizer"),
    ),
    "evaluation": ("rows", "max_new_tokens", "scores", "batch_size", "samples", "general", "general_rows"),
    "gradient_checkpointing": ("enabled", "every_n_layers", "offload"),
    "trainer": (
        *("limit_train_batches", "limit_val_batches", "limit_test_batches", "accumulate_grad_batches", "max_epochs"),
        *("max_steps", "precision", "accelerator", "strategy", "devices", "num_nodes"),
    ),
}
_OWN_CLASSES = (
    *("qlora_lightning.QLoRAModule", "qlora_lightning.PreferenceModule"),
    *("qlora_lightning.InstructionDataModule", "qlora_lightning.PreferenceDataModule"),
)
_STRATEGIES = ("auto", "ddp", "ddp_sharded", "ddp_sharded_offload")
_CODE = ("class_path", "init_args", "optimizer", "trust_remote_code")  # name what is imported, or let it run


def name_adapters(
    values: Sequence[str], reserved: Collection[str] = (BASE,), single: str | None = None
) -> dict[str, Path]:
    """Return adapter folders by name: each value is ``NAME=DIR``, or ``DIR``, which is named after its run folder.

    Args:
        values: as they were typed.
        reserved: names that no adapter may have.
        single: the name of the only adapter, if it has none.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or "/" in name or Path(value).expanduser().exists():
            whole = Path(value).expanduser().absolute()
            name, folder = (whole.parent if whole.name == ADAPTER_FOLDER else whole).name, value
            if single is not None and len(values) == 1:
                name = single
        if not name or name in reserved or name in found:
            raise UserError(f"--adapter {value}: expected DIR or NAME=DIR with a new name, but {name!r} is taken.")
        found[name] = find_adapter_folder(folder)
        if (found[name] / RECORD).is_file():
            raise UserError(
                f"--adapter {value} is a merged model, which needs none: load it with transformers, serve it with "
                f"`vllm serve {folder}`, or run its GGUF file with `llama-cli -m`."
            )
        read_identity(found[name])
    return found


def add_config(adapter: Path | None, arguments: Sequence[str], needs_rows: bool = True) -> list[str]:
    """Return options of ``fit`` with the config of an adapter's run in front, unless they name a config themselves."""
    if adapter is None or find_configs(arguments):
        return list(arguments)
    identity = read_identity(adapter)
    config = adapter.absolute().parent / CONFIG  # of the run folder around it
    if config.is_file():
        settings = _read_run_config(config)
        if not needs_rows or settings["data"].keys() & {"train", "val", "test"}:
            return ["--config", json.dumps(settings), *arguments]
    if needs_rows and not any(each.startswith("--data") for each in arguments):
        raise UserError(
            f"Nothing names the rows: there is no config.yaml beside the adapter folder {adapter}, or it names no file "
            "of this machine. Add --config FILE or --data.val FILE."
        )
    return ["--config", json.dumps(_settings_of(adapter, identity)), *arguments]


def _read_run_config(file: Path) -> dict[str, Any]:
    """Return what counts of the config of a run that the user has not named, and report what does not."""
    config, ignored = read_configs(["--config", str(file)])[str(file)], list[str]()
    if any(isinstance(each, yaml.AliasEvent) for each in yaml.parse(file.read_text(encoding="utf-8"))):
        # a few may stand for billions of values
        raise UserError(f"{file} has YAML aliases: name it by --config, if you trust its author.")
    settings: dict[str, Any] = {}
    for section, keys in _KEYS.items():
        given = config.get(section)
        given = dict(given) if isinstance(given, dict) else {}
        arguments = given.pop("init_args", None)
        given |= arguments if isinstance(arguments, dict) else {}
        settings[section] = {}
        for key in given.keys() & {*keys, *_CODE}:
            if _is_harmless(given[key], f"{section}.{key}"):
                settings[section] |= {key: given[key]} if key in keys else {}
            else:
                ignored.append(f"{section}.{key}: {reprlib.repr(given[key])}")
    if type(config.get("seed_everything")) is int:  # which chooses the rows that are held out
        settings["seed_everything"] = config["seed_everything"]
    if ignored:
        listed = ", ".join(sorted(ignored))
        say(
            f"{file} is not named by --config, so only plain settings of it count. Ignored: {listed}. "
            f"If you trust its author, `--config {file}` takes them too."
        )
    return settings


def _is_harmless(value: Any, name: str) -> bool:
    """Whether a setting of a config from elsewhere, with all that is in it, imports no code and asks no network."""
    if isinstance(value, dict):
        return all(_is_harmless(each, f"{name}.{key}") for key, each in value.items())
    if isinstance(value, list):
        return all(_is_harmless(each, name) for each in value)
    key = name.rpartition(".")[2]
    if key in _CODE:
        return value in (None, False, *_OWN_CLASSES)
    if not isinstance(value, str) or key == "system":
        return True
    if _is_parsed_otherwise(value):
        return False
    if key == "format":
        return "." not in value
    if key == "strategy":
        return value in _STRATEGIES
    if name in ("data.tokenizer", "data.tokenizer.name"):
        return value.startswith("package:") or Path(value).expanduser().is_dir()
    if name.removesuffix(".path") in ("data.train", "data.val", "data.test"):
        is_here = bool(kind_of_file(value)) or glob.has_magic(value) or Path(value).expanduser().exists()
        return is_here and "://" not in value
    return True


def _is_parsed_otherwise(text: str) -> bool:
    """Whether a parser of YAML, as jsonargparse is where a setting may have several types, takes a text for another."""
    try:
        found = load_yaml(text)
    except yaml.YAMLError:
        return True
    return isinstance(found, dict | list) or (isinstance(found, str) and found != text)


def _settings_of(adapter: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what the folder itself holds on its base and on how its rows were rendered, in the form of a config."""
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
