"""Files that a command reads, so that it never writes over one of them."""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.commands.config_files import SUFFIXES, find_configs
from qlora_lightning.data.rows.sources import list_folder

_LARGEST_CONFIG = 1_000_000  # bytes; a larger file is data
_LONGEST_NAME = 4096  # bytes that Linux takes in a path


def find_inputs(words: Sequence[str | Path | None]) -> list[Path]:
    """Find the files that are named on a command line, and by the configs among them.

    Of a folder it is what lies in it; of a folder of rows what lies below it, too; of a run folder its config and its
    adapter. Other folders of the ``trainer`` section are written into, not read.

    Args:
        words: Arguments: ``--data.val=rows.jsonl``, ``a=runs/a/adapter``, a path, or anything else, which names none.
    """
    given = [str(word) for word in words if word is not None]
    search = _Search(find_configs(given))
    option = ""  # to which a word without one belongs
    for word in given:
        name, equals, value = word.partition("=")
        section = _section_of(name if name.startswith("-") else option)
        for text in dict.fromkeys((word, value)):
            search.look_at(text, section)
            if text.startswith(("[", "{")):  # a value in YAML; else it may be a pattern
                search.look_into(_parse(text), section)
        option = "" if equals else name
    return list(search.found)


def _section_of(option: str) -> str:
    section = option.removeprefix("--").partition(".")[0]
    return section if section in ("data", "trainer") else ""


class _Search:
    """Collects files.

    Args:
        configs: Names of configs, whatever they end in.

    Attributes:
        found: The files, in the order in which they were come across.
    """

    def __init__(self, configs: Sequence[str]) -> None:
        self.found: dict[Path, None] = {}
        self._configs = configs
        self._read = set[str]()  # a run's config names the run's own folder, where it lies

    def look_at(self, name: str, section: str) -> None:
        """Collect the files that a name, or a pattern, stands for.

        Args:
            name: The name.
            section: Of a config, in which it stands; empty on the command line.
        """
        if not name or "\0" in name or len(name) > _LONGEST_NAME:
            return
        whole = os.path.expanduser(name)
        for path in map(Path, [whole] if os.path.exists(whole) else glob.glob(whole, recursive=True)):
            if path.is_dir():
                self._look_into_folder(path, section)
                continue
            self.found[path] = None
            if path.suffix in SUFFIXES or name in self._configs:
                self._look_into_config(path, section)

    def look_into(self, config: Any, section: str) -> None:
        """Collect the files that a config, or one value of it, names."""
        parts = config.items() if isinstance(config, dict) and not section else [(section, config)]
        for key, value in parts:
            for text in _strings(value):
                self.look_at(text, section or _section_of(str(key)))

    def _look_into_config(self, file: Path, section: str) -> None:
        real = os.path.realpath(file)
        if real in self._read or not file.is_file() or file.stat().st_size > _LARGEST_CONFIG:
            return
        self._read.add(real)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return  # it is no config, or told of where it is parsed
        if not text.lstrip().startswith("["):  # those are rows
            self.look_into(_parse(text, json.loads if file.suffix == ".json" else yaml.safe_load), section)

    def _look_into_folder(self, folder: Path, section: str) -> None:
        is_run = (folder / "adapter").is_dir()
        if section == "trainer" and not is_run:
            return
        adapter = folder / "adapter" if is_run else folder
        config = adapter.absolute().parent / "config.yaml"
        if (adapter / "adapter_config.json").is_file() and config.is_file():
            self.look_at(str(config), "")
        files = [each for each in adapter.iterdir() if each.is_file()]
        rows = list_folder(folder) if section == "data" else []
        self.found.update(dict.fromkeys([*files, *rows]))


def _parse(text: str, read: Callable[[str], Any] = yaml.safe_load) -> Any:
    """Parse a config; JSON by its own parser, which is much quicker."""
    try:
        return read(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings of a value, whose parts YAML lets hold each other, and be held many times."""
    open_, seen = [value], set[int]()
    while open_:
        value = open_.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            open_ += value.values() if isinstance(value, dict) else value
