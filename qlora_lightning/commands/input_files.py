"""Files that a command reads, so that it never writes over one of them."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

_CONFIGS = (".yaml", ".yml")
_LARGEST_CONFIG = 1_000_000  # bytes; a larger file is data
_LONGEST_NAME = 4096  # bytes that Linux takes in a path


def find_inputs(words: Sequence[str | Path | None]) -> list[Path]:
    """Find the files that are named on a command line, and by the configs among them.

    Of a folder it is what lies in it; of a run folder its config and its adapter.

    Args:
        words: Arguments: ``--data.val=rows.jsonl``, ``a=runs/a/adapter``, a path, or anything else, which names none.
    """
    found: dict[Path, None] = {}
    parsed: set[str] = set()
    for word in words:
        if word is not None:
            for name in dict.fromkeys((str(word), str(word).partition("=")[2])):
                found.update(dict.fromkeys(_find(name, parsed, configs=True)))
    return list(found)


def _find(name: str, parsed: set[str], configs: bool) -> Iterator[Path]:
    """Yield the files that a name, or a pattern, stands for.

    Args:
        name: The name.
        parsed: Configs that need not be looked into again: a run's names the run's own folder, where it lies.
        configs: Whether to look into configs.
    """
    if not name or "\0" in name or len(name) > _LONGEST_NAME:
        return
    whole = os.path.expanduser(name)
    for path in map(Path, [whole] if os.path.exists(whole) else glob.glob(whole)):
        if path.is_dir():
            yield from _lying_in(path, parsed)
            continue
        yield path
        real = os.path.realpath(path)
        if not configs or real in parsed or path.suffix not in _CONFIGS or not path.is_file():
            continue
        parsed.add(real)
        if path.stat().st_size < _LARGEST_CONFIG:
            for inner in _strings(_load(path)):
                yield from _find(inner, parsed, configs=False)


def _lying_in(folder: Path, parsed: set[str]) -> Iterator[Path]:
    is_run = (folder / "adapter").is_dir()
    adapter = folder / "adapter" if is_run else folder
    config = adapter.absolute().parent / "config.yaml"
    if (adapter / "adapter_config.json").is_file() and config.is_file():
        yield from _find(str(config), parsed, configs=True)
    yield from (each for each in adapter.iterdir() if each.is_file())


def _load(config: Path) -> Any:
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None  # it is no config, or told of where it is parsed


def _strings(config: Any) -> Iterable[str]:
    """Yield the strings of a config, whose parts YAML lets hold each other, and be held many times."""
    open_, seen = [config], set[int]()
    while open_:
        value = open_.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            open_ += value.values() if isinstance(value, dict) else value
