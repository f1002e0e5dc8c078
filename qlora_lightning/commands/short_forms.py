"""The short forms that users type, turned into what jsonargparse reads, and back for the saved config."""

import math
from typing import Any

CALLBACK_KEYS = ("gradient_checkpointing", "adapter_checkpoint", "gpu_memory", "throughput", "evaluation", "ema")
_OFF, _ON = ("null", "none", "false", "~"), ("true",)


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


def expand_arguments(arguments: list[str]) -> list[str]:
    """Expand ``--gpu_memory null`` (or ``false``, ``true``) on the command line, and join ``--key -1e-3`` by ``=``.

    Without it argparse takes ``-1e-3`` for an option, and finds no value for the key.
    """
    expanded: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name.removeprefix("--") in CALLBACK_KEYS and name.startswith("--"):
            if not equals and rest:
                value, equals = rest.pop(0), "="
            if value.lower() in (*_OFF, *_ON):
                name, value = f"{name}.enabled", str(value.lower() in _ON).lower()
        elif name.startswith("--") and not equals and rest and _is_negative(rest[0]):
            value, equals = rest.pop(0), "="
        expanded.append(f"{name}{equals}{value}")
    return expanded


def _is_negative(text: str) -> bool:
    try:
        return text.startswith("-") and math.isfinite(float(text))
    except ValueError:
        return False


def shorten_config(config: dict[str, Any], default_classes: dict[str, str]) -> dict[str, Any]:
    """Write model and data flat, with a ``class_path`` only where it is not the default one."""
    short = dict(config)
    for key, default in default_classes.items():
        value = dict(short.get(key) or {})
        class_path, flat = value.pop("class_path", default), dict(value.pop("init_args", None) or {})
        short[key] = {**({} if class_path == default else {"class_path": class_path}), **flat, **value}
    return short
