"""Translate module names between this package and the adapter folder, in both directions.

Plain PEFT loads the folder onto the whole model, which has transformers' own names. Most names are the same in both.
These differ:

| case                                          | here                       | in the folder                        |
|-----------------------------------------------|----------------------------|--------------------------------------|
| the base is the text of a whole model         | `model.layers.0.mlp`       | `model.language_model.layers.0.mlp`  |
| a linear that PEFT takes for that of an expert | `target_modules: [mlp.up]` | `target_parameters: [mlp.up.weight]` |
| in both cases: `rank_pattern`, `alpha_pattern` | ends of names, expressions | full names                           |
| in the first: `target_modules`,                | ends of names, expressions | full names                           |
| `modules_to_save`, `feedforward_modules`       |                            |                                      |

:func:`config_in_folder` translates to the folder's names, and :func:`settings_here` back. An adapter that is opened and
saved again has the same config and tensors.
"""

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import peft
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from qlora_lightning.model.load.wrapped import rename

_PATTERNS = ("rank_pattern", "alpha_pattern")
_SETTINGS = (  # PEFT settings that name modules
    *("target_modules", "target_parameters", "feedforward_modules", "modules_to_save"),
    *(*_PATTERNS, "trainable_token_indices"),
)
_KEY_PREFIX = "base_model.model."  # of each tensor's key in a folder


# ---- to the folder ---------------------------------------------------------------------------------------------------


def config_in_folder(model: peft.PeftModel) -> Any:
    """Return the config of a model's active adapter, with the names used in the folder."""
    adapter = model.active_adapter
    config, prefixes = copy.copy(model.peft_config[adapter]), _prefixes_in_folder(model.get_base_model().config)
    targets = _targets(model, adapter)
    is_lora = isinstance(config, peft.LoraConfig)
    as_parameters = taken_for_experts(model, targets) if is_lora else []
    if prefixes or as_parameters:
        config.target_modules = {*targets} - {*as_parameters}
    if is_lora and (prefixes or as_parameters):
        parameters = config.target_parameters or ()
        config.target_parameters = {*parameters, *(f"{name}.weight" for name in as_parameters)} or None
        for key in _PATTERNS:
            pattern = by_full_names(getattr(config, key) or {}, [*targets, *parameters])
            pattern = {f"{name}.weight" if name in as_parameters else name: value for name, value in pattern.items()}
            setattr(config, key, pattern)
    if prefixes and isinstance(config, peft.IA3Config):
        config.feedforward_modules = {name for name, layer in targets.items() if layer.is_feedforward}
    if prefixes and config.modules_to_save:
        modules = model.get_base_model().named_modules()
        config.modules_to_save = [name for name, module in modules if isinstance(module, ModulesToSaveWrapper)]
    for key, value in _rename_settings(vars(config), prefixes).items():
        setattr(config, key, sorted(value) if isinstance(value, set) else value)  # a set's order changes between runs
    return config


def key_in_folder(key: str, base_config: Any) -> str:
    """Return a tensor's key in the folder, from PEFT's key, which has the name here."""
    prefixes = _prefixes_in_folder(base_config)
    return rename(key, {f"{_KEY_PREFIX}{here}": f"{_KEY_PREFIX}{there}" for here, there in prefixes.items()})


def _targets(model: peft.PeftModel, adapter: str) -> dict[str, Any]:
    """Return the layers that carry an adapter, by full name here."""
    base = model.get_base_model()
    names = getattr(model.base_model, "targeted_module_names", ())  # of all adapters
    layers = {name: base.get_submodule(name) for name in names}
    return {
        name: layer
        for name, layer in layers.items()
        if any(adapter in getattr(layer, tensors) for tensors in layer.adapter_layer_names)
    }


# ---- from the folder -------------------------------------------------------------------------------------------------


def settings_here(stored: Mapping[str, Any], keys: Iterable[str], base_config: Any) -> dict[str, Any]:
    """Return the settings of a folder's ``LoraConfig``, with the names used here.

    Args:
        stored: The settings in the folder.
        keys: The keys of the folder's tensors. They tell which modules carry the adapter, because the config may have
            only an expression.
        base_config: transformers' config of the base; ``None`` if it is unknown.
    """
    # linears that were saved as parameters become modules again
    parameters = [name for name in stored.get("target_parameters", ()) if not name.endswith(".weight")]
    experts = tuple(name.rpartition(".")[0] or "experts" for name in parameters)  # the ends of their names
    names = [key.removeprefix(_KEY_PREFIX) for key in keys]
    carriers = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    linears = sorted(name for name in carriers if not name.removesuffix(".base_layer").endswith(experts))
    settings = {**stored, "target_parameters": parameters or None, "target_modules": linears}
    for key in _PATTERNS:
        settings[key] = {name.removesuffix(".weight"): value for name, value in settings.get(key, {}).items()}
    # PEFT matches the patterns again, with no time limit on an expression; here, the caller's time limit applies
    matched = {key: by_full_names(settings[key], [*linears, *parameters]) for key in _PATTERNS}
    if prefixes := {there: here for here, there in _prefixes_in_folder(base_config).items()}:
        settings |= matched
        saved = {name.rpartition(".")[0] for name in names if ".lora_" not in name}
        ends = tuple(settings.get("modules_to_save", ()))
        settings["modules_to_save"] = sorted(name for name in saved if name.endswith(ends)) or None
        settings |= _rename_settings(settings, prefixes)
    return settings


# ---- in both ---------------------------------------------------------------------------------------------------------


def _prefixes_in_folder(base_config: Any) -> dict[str, str]:
    """Return the prefixes in the folder by those here; empty if the base is a whole model."""
    return getattr(base_config, "names_in_wrapper", {})


def by_full_names(pattern: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the values that PEFT finds for full names in a pattern, whose keys are ends of names or expressions."""
    keys = {name: get_pattern_key(list(pattern), name) for name in names}  # the name itself if nothing matches
    return {name: pattern[key] for name, key in sorted(keys.items()) if key in pattern}


def _rename_settings(settings: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Return the PEFT settings that name modules, with other prefixes."""
    renamed: dict[str, Any] = {}
    for key in _SETTINGS:
        value = settings.get(key)
        if isinstance(value, dict):
            renamed[key] = {rename(name, prefixes): each for name, each in value.items()}
        elif isinstance(value, list | set):
            renamed[key] = type(value)(rename(name, prefixes) if isinstance(name, str) else name for name in value)
    return renamed


# ---- linears that PEFT mistakes for those of experts -----------------------------------------------------------------


def taken_for_experts(model: nn.Module, targets: Collection[str]) -> list[str]:
    """Return the targets whose last names make PEFT mistake them for linears of the experts next to them.

    In older versions of transformers, each expert had linears with these names, and PEFT opens adapters from then in
    this way. MLPs next to a mixture's experts are therefore saved as ``target_parameters``, which PEFT does not move.
    """
    taken = set()
    for last_name in {name.rpartition(".")[2] for name in targets}:
        config = peft.LoraConfig(target_modules=[last_name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # PEFT moves some names only together
            taken.add(last_name)
        if last_name not in config.target_modules:
            taken.add(last_name)
    return [name for name in targets if name.rpartition(".")[2] in taken]


@contextlib.contextmanager
def keeping_targets(base: Any) -> Iterator[None]:
    """Keep PEFT from moving targets to the experts, which it decides by the base's type."""
    model_type, base.config.model_type = base.config.model_type, ""
    try:
        yield
    finally:
        base.config.model_type = model_type
