"""Whether options that the user wrote contradict an adapter folder that training goes on with."""

import inspect
from typing import Any

import peft
from transformers import PreTrainedModel

from qlora_lightning.errors import UserError
from qlora_lightning.model.adapters.identity import describe_adapter
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.adapters.targets import layer_of, resolve_targets

_OPTIONS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")


def chosen_targets(model: PreTrainedModel, options: dict[str, Any]) -> list[str] | None:
    """Name the modules that the options choose; ``None`` where they choose none, and the adapter's own rule.

    Args:
        model: The base, without adapters.
        options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`.
    """
    chosen = _changed(options)
    if not {"target_modules", "layers"} & chosen.keys():
        return None
    return resolve_targets(model, options["target_modules"], options["layers"])


def check_adapter_options(
    model: peft.PeftModel, targets: list[str] | None, options: dict[str, Any], folder: str
) -> None:
    """Refuse options that contradict the adapter that training goes on with: they would be ignored.

    Args:
        model: The base with the adapter of the folder.
        targets: What :func:`chosen_targets` gave before.
        options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`; defaults contradict nothing.
        folder: The adapter folder, for the message.

    Raises:
        UserError: An option asks for something else.
    """
    stored, chosen = describe_adapter(model), _changed(options)
    for name in ("rank", "alpha", "dropout"):
        if name in chosen and chosen[name] != stored[name]:
            raise _contradiction(name, chosen[name], stored[name], folder)
    if targets is not None:
        _check_targets(model, targets, chosen, stored, folder)
    for name, value in (chosen.get("lora_options") or {}).items():
        found = stored["lora_options"].get(name)
        if name in _OPTIONS and (value or None) != found:  # the others, as the initialization, are of the past
            raise _contradiction(f"lora_options.{name}", value, found, folder)


def _check_targets(
    model: peft.PeftModel, targets: list[str], chosen: dict[str, Any], stored: dict[str, Any], folder: str
) -> None:
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    layers = {layer_of(name) for name in adapted}
    if "layers" in chosen and layers != {layer_of(name) for name in targets}:
        raise _contradiction("layers", chosen["layers"], stored["layers"], folder)
    if "target_modules" in chosen and adapted != {name for name in targets if layer_of(name) in layers}:
        raise _contradiction("target_modules", chosen["target_modules"], stored["target_modules"], folder)


def _changed(options: dict[str, Any]) -> dict[str, Any]:
    defaults = inspect.signature(add_adapters).parameters
    return {name: value for name, value in options.items() if value != defaults[name].default}


def _contradiction(name: str, asked: Any, stored: Any, folder: str) -> UserError:
    return UserError(
        f"model.{name} is {asked}, but the adapter in {folder} has {stored}, and training goes on with that: "
        f"leave model.{name} out, or train a new adapter without model.adapter."
    )
