"""Turns what jsonargparse says of a wrong key or value into one sentence, with the nearest right key."""

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence

from qlora_lightning.commands.config_files import find_configs
from qlora_lightning.support.errors import UserError


def check_top_level(config: object, arguments: Sequence[str], known: Mapping[str, type | None]) -> None:
    """Refuse a key of a whole config that nothing reads: jsonargparse lets one with nothing in it pass.

    Args:
        config: What a YAML file holds.
        arguments: The command line.
        known: As for :func:`word_parse_error`.

    Raises:
        UserError: There is such a key.
    """
    if not isinstance(config, dict) or not {"model", "data", "trainer"} & config.keys():
        return  # a single value, which is loaded the same way
    for key in config:
        if key not in known:
            raise UserError(f"There is no key {str(key)!r}.{_nearest(str(key), known)} ({_place(str(key), arguments)})")


def word_parse_error(message: str, arguments: Sequence[str], known: Mapping[str, type | None]) -> UserError:
    """Word a parse error.

    Args:
        message: jsonargparse's own words, over several lines.
        arguments: The command line.
        known: The top-level keys, each with the class whose arguments its own keys are.
    """
    command = arguments[0] if arguments else ""
    for pattern, word in (
        (r"File does not exist: '?(?P<file>[^'\n]+)'?", _missing_file),
        (r"Problems parsing config: (?P<fault>[\s\S]+)", _bad_yaml),
        (r"unrecognized arguments: --(?P<key>[^\s=]+)", _unknown_key),
        (r"does not accept option '(?P<key>[^']+)'", _unknown_key),
        (r"Parser key \"(?P<parent>\w+)\"[\s\S]*Option '(?P<name>[^']+)' is not accepted", _unknown_nested_key),
        (r"the following arguments are required: (?P<name>\w+)", _missing_key),
        (r"given class_path '(?P<path>[^']+)':\s*(?P<fault>No module[^\n]*|module [^\n]* has no[^\n]*)", _bad_class),
        (r"Import path (?P<path>\S+) (?P<fault>does not correspond to a subclass of \w+)", _bad_class),
        (r"Unexpected config:", _not_a_mapping),
        (r"Parser key \"(?P<key>[\w.]+)\"[\s\S]*?Expected an? (?P<type>.+)\. Got value: (?P<value>.+)", _bad_value),
        (r"Parser key \"(?P<key>[\w.]+)\"[\s\S]*Given value: ", _bad_union_value),
    ):
        match = re.search(pattern, message)
        if match:
            sentence = word(match, message, known)
            return UserError(f"{sentence} ({_where(match, arguments)})" if word in _NAMES_PLACE else sentence)
    first = message.strip().splitlines()[0] if message.strip() else "the command line is not understood"
    return UserError(f"{first}. See `qlora-lightning {command} --help`.")


def _missing_file(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    return f"--config names {match['file']}, but there is no such file. Paths are relative to the current folder."


def _bad_yaml(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    place = re.search(r"line \d+, column \d+", match["fault"])
    reason = " ".join(line.strip() for line in match["fault"].splitlines() if line.strip(" ^") and 'in "' not in line)
    return f"The config is not YAML: {reason}{f' ({place[0]})' if place else ''}."


def _not_a_mapping(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    return f"The config is empty, or no mapping: expected keys such as {', '.join(list(known)[:4])}."


def _unknown_key(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    parent, _, name = match["key"].partition(".")
    if parent not in known:
        return f"There is no key {parent!r}.{_nearest(parent, known)}"
    return _unknown(parent, name, known)


def _unknown_nested_key(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    return _unknown(match["parent"], match["name"], known)


def _unknown(parent: str, name: str, known: Mapping[str, type | None]) -> str:
    owner = known[parent]
    names = [] if owner is None else [key for key in inspect.signature(owner).parameters if key != "kwargs"]
    return f"There is no key {f'{parent}.{name}'!r}.{_nearest(name, names, parent)}"


def _missing_key(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    if match["name"] == "base":
        return (
            "model.base is missing: name a hub id, a folder, a .gguf file or package:NAME, in the YAML given by "
            "--config or by --model.base."
        )
    return f"{match['name']} is missing: it has no default."


def _bad_class(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    return f"class_path {match['path']!r} cannot be used: {match['fault'].strip().rstrip('.')}."


def _bad_value(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    keys = re.findall(r"Parser key \"([\w.]+)\"", message)
    return f"{'.'.join(keys)} is {match['value'].strip()}: expected {_plain_type(match['type'])}."


def _bad_union_value(match: re.Match[str], message: str, known: Mapping[str, type | None]) -> str:
    keys = re.findall(r"Parser key \"([\w.]+)\"", message)
    values = list(re.finditer(r"Given value: (.+)", message))  # of the inner keys first
    inner = values[-len(keys)] if len(keys) <= len(values) else values[-1]
    types = re.findall(r"- Expected an? (.+)", message[: inner.start()])
    expected = " or ".join(dict.fromkeys(_plain_type(name) for name in types)) or "another value"
    return f"{'.'.join(keys)} is {inner[1].strip()}: expected {expected}."


_NAMES_PLACE = (_bad_yaml, _unknown_key, _unknown_nested_key, _not_a_mapping, _bad_class)


def _plain_type(text: str) -> str:
    """``<class 'int'>`` and ``typing.Literal['a', 'b']`` as a person would say them."""
    choices = re.search(r"Literal\[(.+)\]", text)
    if choices:
        return f"one of {choices[1]}".replace("'", "")
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text.split(". Got value")[0]).strip()
    return {"NoneType": "null", "int": "an integer", "float": "a number", "bool": "true or false"}.get(name, name)


def _nearest(name: str, names: Sequence[str] | Mapping[str, type | None], parent: str = "") -> str:
    others = [each for each in names if each != name]  # a class of the user's own may lack what ours has
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
    prefix = f"{parent}." if parent else ""
    if close:
        return f" Did you mean {prefix}{close[0]}?"
    return f" Keys here are {', '.join(others)}."


def _where(match: re.Match[str], arguments: Sequence[str]) -> str:
    found = match.groupdict()
    return _place(found.get("key") or f"{found.get('parent')}.{found.get('name')}", arguments)


def _place(key: str, arguments: Sequence[str]) -> str:
    if any(argument.split("=")[0] == f"--{key}" for argument in arguments):
        return "on the command line"
    files = find_configs(arguments)
    return f"in {', '.join(files)}" if files else "on the command line"
