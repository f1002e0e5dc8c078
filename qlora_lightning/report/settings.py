"""Settings as flat names, and those in which runs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_UNTOLD = ("trainer.default_root_dir",)  # differs between any two runs, and changes nothing


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give ``{"model.rank": 8, …}`` of a nested config; lists and empty sections stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def find_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Give each setting in which configs differ, with its value in each; ``None`` where one lacks it."""
    flat = [flatten(config) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config if name not in _UNTOLD)
    columns = {name: [config.get(name) for config in flat] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def write_setting(value: Any) -> str:
    """Write a setting as YAML has it, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
