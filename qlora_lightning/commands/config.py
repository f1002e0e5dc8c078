"""Config files and options of a command line: their keys are checked before slow imports; short forms are expanded."""

import argparse
import ast
import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.commands.recipes import find_recipes
from qlora_lightning.support.errors import UserError, nearest
from qlora_lightning.support.files import ADAPTER_FOLDER, CONFIG, IDENTITY, MANIFEST, load_yaml

CALLBACKS = {
    "gradient_checkpointing": "qlora_lightning.model.activation_checkpointing.GradientCheckpointing",
    "adapter_checkpoint": "qlora_lightning.callbacks.adapter_checkpoint.AdapterCheckpoint",
    "gpu_memory": "qlora_lightning.callbacks.monitors.GPUMemoryMonitor",
    "throughput": "qlora_lightning.callbacks.monitors.ThroughputMonitor",
    "evaluation": "qlora_lightning.callbacks.evaluation.Evaluation",
}
"""Classes of callbacks by their keys in a config: names, since ``cli.py`` imports this file before torch."""
SECTIONS = {
    "model": "qlora_lightning.model.module.QLoRAModule",
    "data": "qlora_lightning.data.datamodule.InstructionDataModule",
    **CALLBACKS,
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
}
"""Class of each section of a config, whose arguments are the keys."""
TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "default_root_dir": "runs/default",
    "log_every_n_steps": 1,  # a step of a language model takes seconds: a line for each is cheap
    "enable_model_summary": False,  # a line of ours says more
}
_OWN_CLASS = ("model", "data")  # sections of which the user may name another class
_OTHER_NAMES = {  # of our keys, in TRL, Axolotl, LLaMA-Factory and Lightning 1
    "model.base": "base_model model_name model_name_or_path",
    "model.quantization": "bnb_4bit_quant_type load_in_4bit load_in_8bit quantization_bit",
    "model.compute_dtype": "bf16 bnb_4bit_compute_dtype dtype fp16 torch_dtype",
    "model.rank": "lora_r lora_rank r",
    "model.target_modules": "lora_target lora_target_linear",
    "model.learning_rate": "lr",
    "model.lora_options": "loftq lora_modules_to_save use_dora use_rslora",
    "model.schedule": "lr_scheduler lr_scheduler_type",
    "model.warmup": "warmup_steps warmup_ratio",
    "model.optimizer": "optim",
    "data.train": "data_path dataset dataset_name datasets train_dataset train_file",
    "data.val": "eval_dataset eval_file test_datasets validation_file",
    "data.val_fraction": "test_size val_set_size val_size",
    "data.batch_size": "micro_batch_size per_device_eval_batch_size per_device_train_batch_size",
    "data.tokens_per_batch": "packing sample_packing",
    "data.max_length": "cutoff_len max_seq_len max_seq_length model_max_length sequence_len",
    "data.train_on": "assistant_only_loss completion_only_loss train_on_inputs",
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps",
    "trainer.max_epochs": "epochs num_epochs num_train_epochs",
    "trainer.gradient_clip_val": "max_grad_norm",
    "trainer.val_check_interval": "eval_steps",
    "trainer.log_every_n_steps": "logging_steps",
    "trainer.logger": "report_to",
    "gradient_checkpointing.enabled": "gradient_checkpointing use_gradient_checkpointing",
    "adapter_checkpoint.save_top_k": "save_total_limit",
    "trainer.default_root_dir": "output_dir",
    "trainer.devices": "gpus",
    "trainer.strategy": "deepspeed fsdp",
    "adapter_checkpoint.every_n_train_steps": "save_steps",
    "seed_everything": "seed",
    "ckpt_path": "resume_from_checkpoint",
}
SEE_HELP = "See `qlora-lightning fit --help`."
_MANIFEST_FORMAT = b'"format": "qlora_lightning manifest"'


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Return the value of each ``--config`` and ``-c``, as it was typed, except a config itself as JSON."""
    return [name for name in _split_arguments(arguments)[0]["config"] if not name.startswith("{")]


def read_config(name: str) -> dict[str, Any]:
    """Read the config file of this name, as it was typed."""
    try:
        config = load_yaml(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        reason = str(error.strerror).lower()
        raise UserError(f"--config {name}: {reason}. {_hint_at_recipe(name)}") from error
    except (UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{name} is empty or no mapping: expected keys such as model, data and trainer.")
    return config


def _hint_at_recipe(name: str) -> str:
    """Return where the config comes from that a user names, but that is not here."""
    recipe = Path(name).name.removesuffix(".yaml")
    if recipe in find_recipes():
        return f"`qlora-lightning recipes copy {recipe}` makes configs/{recipe}.yaml."
    return "`qlora-lightning recipes` lists configs to copy."


def _hint_at_config(name: str) -> str:
    """Return how a config is named, for an argument without an option."""
    files = [file for file in (name, f"{name}.yaml", f"{name}.yml") if Path(file).is_file()]
    is_config = name.endswith((".yaml", ".yml")) and Path(name).stem not in find_recipes()
    if files or is_config:
        return f"Did you mean --config {files[0] if files else name}?"
    return f"A config is named by --config FILE, and {_hint_at_recipe(name)}"


def expand_arguments(arguments: Sequence[str], has_own_options: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the configs of a command line; return them with their short forms expanded, and the other arguments.

    Keys are checked; with ``has_own_options`` an option without a dot may be the command's own. ``--gpu_memory null``
    is a config of one key. With the ``config.yaml`` of a run folder, the run folder is the one in which that file is:
    it may have been moved since.
    """
    short, others = _split_arguments(arguments)
    configs: list[dict[str, Any]] = []
    for name in short.pop("config"):
        config = json.loads(name) if name.startswith("{") else read_config(name)
        file = Path(name).expanduser()
        if file.name == CONFIG and _is_run_folder(file.parent):
            config["trainer"] = {**(config.get("trainer") or {}), "default_root_dir": str(file.parent)}
        configs.append(config)
    for key, text in short.items():
        section, _, name = key.partition(".")
        value = load_yaml(text)
        configs.append({section: {name: value} if name else value})
    configs = [_expand_config(config) for config in configs]
    check_keys(configs, [each for each in others if not has_own_options or "." in each.partition("=")[0]])
    return configs, others


def _is_run_folder(folder: Path) -> bool:
    manifest = folder / MANIFEST  # other programs have files of that name
    is_ours = manifest.is_file() and _MANIFEST_FORMAT in manifest.read_bytes()[:200]
    return is_ours or (folder / ADAPTER_FOLDER / IDENTITY).is_file()


def _split_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the configs and the short forms of a command line, by name, and its other arguments."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", "-c", action="append", default=[])
    for key in CALLBACKS:
        parser.add_argument(f"--{key}", dest=key)
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.") from error
    return vars(options), others


def _expand_config(config: dict[str, Any]) -> dict[str, Any]:
    """Expand keys beside a ``class_path``, and ``null`` or ``false`` for a callback."""
    for key in ("model", "data"):
        value = config.get(key)
        if isinstance(value, dict) and "class_path" in value:
            flat_settings = {name: value.pop(name) for name in list(value) if name not in ("class_path", "init_args")}
            value["init_args"] = {**flat_settings, **(value.get("init_args") or {})}
    for key in CALLBACKS:
        if key in config and not isinstance(config[key], dict):
            config[key] = {"enabled": False if config[key] is None else config[key]}
    return config


# ---- keys ------------------------------------------------------------------------------------------------------------


def read_class(path: str) -> ast.ClassDef:
    """Read the source of a class without importing it or its package, which would take seconds."""
    package, *modules, class_name = path.split(".")
    spec = find_spec(package)
    assert spec is not None
    file = Path((spec.submodule_search_locations or [])[0], *modules).with_suffix(".py")
    classes = (node for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ClassDef))
    return next(node for node in classes if node.name == class_name)


def read_arguments(source: ast.ClassDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """Return the arguments of a class, each with its default, which is ``None`` if there is none."""
    init = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == "__init__").args
    by_position = init.args[1:]
    required = [None] * (len(by_position) - len(init.defaults))
    defaults = [*required, *init.defaults, *init.kw_defaults]
    return list(zip([*by_position, *init.kwonlyargs], defaults, strict=True))


@functools.cache
def known_keys() -> list[str]:
    """List the keys of a config."""
    keys = ["config", "seed_everything", "ckpt_path"]
    for section, path in SECTIONS.items():
        keys += [f"{section}.{argument.arg}" for argument, _ in read_arguments(read_class(path))]
    return [*keys, *(f"{section}.class_path" for section in _OWN_CLASS)]


def check_keys(configs: Sequence[Mapping[str, Any]], options: Sequence[str]) -> None:
    """Reject an unknown key. Those of a class that the user names, and nested ones, are left to jsonargparse."""
    names = [option[2:].partition("=")[0].replace(".init_args.", ".") for option in options if option[:2] == "--"]
    is_stray = bool(options) and not options[0].startswith("-")  # a config without --config has a message of its own
    if is_stray or "-h" in options or any(name.endswith("help") for name in names):
        return
    typed = [str(section) for config in configs for section in config]  # first: another tool's are all unknown
    own_class = {name for name in names if name in _OWN_CLASS}
    for config in configs:
        for section, settings in config.items():
            if not isinstance(settings, dict):
                own_class.add(section)
            elif section in SECTIONS:
                arguments = settings.get("init_args") if section in _OWN_CLASS else None
                typed += [f"{section}.{name}" for name in {**settings, **(arguments or {})} if name != "init_args"]
    typed += names
    own_class |= {key.partition(".")[0] for key in typed if key.endswith(".class_path")}
    known = {*known_keys(), *SECTIONS, "print_config"}
    for key in typed:
        section, _, name = key.partition(".")
        is_plain = not name or (section not in own_class and name.strip("+").isidentifier())
        if is_plain and key.rstrip("+") not in known:
            raise UserError(describe_unknown_key(key), key)


def describe_unknown_key(key: str) -> str:
    """Return the message of an unknown key, with the key of ours that may be meant."""
    name = key.rpartition(".")[2]
    likely = [ours for ours, names in _OTHER_NAMES.items() if name in names.split()]
    likely += [known for known in known_keys() if known.endswith(f".{name.removeprefix('lora_')}")]
    hint = f" Did you mean {likely[0]!r}?" if likely else nearest(key, known_keys())
    return f"There is no key {key!r}.{hint} {SEE_HELP}"


def shorten_parse_error(message: str) -> str:
    """Return jsonargparse's message in one line: of a wrong value its key, the innermost reason, and the value."""
    if stray := re.search(r"unrecognized arguments: ([^-\s]\S*)", message):
        return f"There is no option before {stray[1]}. {_hint_at_config(stray[1])} {SEE_HELP}"
    sections = re.findall(r"""(?:Parser key "|Group ')([\w.]+)""", message)
    option = re.search(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.-]+\+?)", message)
    if option is not None:
        return describe_unknown_key(".".join([*sections, option[1]]))
    lines = [(len(line) - len(line.lstrip(" -")), line.strip(" -")) for line in message.splitlines()]
    reasons = [line.rpartition('": ')[2] for indentation, line in lines if indentation == max(lines)[0]]
    reason = reasons[0] + "".join(f" or {other.removeprefix('Expected ')}" for other in reasons[1:])  # of a union
    values = re.findall(r"Given value: (?!Nested|Name|\{).*", message)  # not all settings of a class
    text = ". ".join([reason, *values[-1:]]).replace("a <class 'NoneType'>", "null")
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", re.sub(r"an? <class '([\w.]+)'>", r"\1", text))
    return f"{'.'.join(dict.fromkeys(sections))}: {text}. {SEE_HELP}".removeprefix(": ")
