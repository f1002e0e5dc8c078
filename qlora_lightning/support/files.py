"""Files that are whole or not there, and what users may have cut off or mixed up in JSON and YAML."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.support.errors import UserError


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a small file so that a reader, and a machine that dies, leave the old or the new one, never half.

    A link is followed: the file that it leads to is replaced, and keeps its mode. What is no regular file (a pipe, a
    terminal, ``/dev/stdout``) cannot be replaced, and is written into.

    Raises:
        OSError: The disk is full or fails, or who reads the pipe has gone.
    """
    # a file name may hold bytes that are no UTF-8, which Python keeps as lone surrogates
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    stream = _find_stream(file)
    if stream is not None:
        with os.fdopen(stream, "wb") as opened:
            opened.write(data)
        return
    target = Path(os.path.realpath(file))
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        unfinished.write_bytes(data)
        if target.exists():
            shutil.copymode(target, unfinished)
        put_in_place(unfinished, target)
    except BaseException:  # Ctrl-C too
        unfinished.unlink(missing_ok=True)
        raise


def is_stream(file: Path) -> bool:
    """Whether a name leads to what is written into and not replaced: a pipe, a terminal, this process's own output."""
    return (file.exists() and not file.is_file() and not file.is_dir()) or _find_own_output(file) is not None


def find_stream_fault(file: Path) -> str | None:
    """Say what a name that leads to a stream is, where it is none to write into; nothing where it is.

    A named pipe is none: to wait for who reads it may be for ever, and to try whether somebody does would end him.
    """
    if _find_own_output(file) is not None:
        return None
    mode, place = file.stat().st_mode, Path(os.path.realpath(file))
    if stat.S_ISFIFO(mode) and place.exists() and place.parts[:2] != ("/", "dev"):
        return "a named pipe"
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        return "a socket or a disk"
    return None


def set_usual_mode(file: Path) -> None:
    """Give a file the mode that the umask wants: safetensors lets nobody but its owner read what it writes."""
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def put_in_place(unfinished: Path, target: Path) -> None:
    """Flush a file that is written, and give it the name under which it counts; a file of that name stays until then.

    Raises:
        OSError: The disk fails, or is no longer there.
    """
    flush(unfinished)
    os.replace(unfinished, target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the names that were changed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network mounts may not flush a folder
            raise
    finally:
        os.close(descriptor)


def _find_stream(file: Path) -> int | None:
    """Open what is no regular file for writing; of this process's own output, a second handle to the same place in it.

    Opened by its name, ``/dev/stdout`` that leads into a file would be written from its beginning again.
    """
    own = _find_own_output(file)
    if own is not None:
        for printed in (sys.stdout, sys.stderr):
            printed.flush()
        return os.dup(own)
    return os.open(file, os.O_WRONLY) if is_stream(file) else None


def _find_own_output(file: Path) -> int | None:
    """Give the descriptor of this process's output that a name leads to."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(file.stat(), os.fstat(descriptor)):
                return descriptor
    return None


def find_storage_fault(error: BaseException | None) -> str | None:
    """Say what the disk had against a write: `No space left on device`; nothing where an error is of another kind.

    torch hides it behind a RuntimeError of its own, and what is written in Rust (safetensors, tokenizers) says it in
    the text of the message only.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        found = re.search(r"([^:\n]+) \(os error \d+\)", str(error))
        if found:
            return found[1].strip()
        error = error.__cause__ or error.__context__
    return None


@dataclass(frozen=True)
class Positive:
    """A number above zero, of that kind, up to ``most``."""

    kind: type
    most: int


Shape = type | str | Positive | dict[str, Any] | list[Any] | tuple[Any, ...] | None
"""What is expected of a value.

``str``, ``bool``, ``int`` (of 64 bits) or ``float`` (any finite number); ``Positive(int, 8)``, one from 1 to 8;
a string, which is the one allowed value; ``{key: shape}``, an object whose keys may be missing, ``"key!"`` one that
must be there, ``"*"`` and ``"*!"`` all the others; ``[shape]``, a list; ``(shape, …)``, one of several; ``None``,
anything. Null counts as missing.
"""
_WORDS: dict[type, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}


def find_fault(value: Any, shape: Shape, place: str = "") -> str | None:
    """Say what is wrong with a value, in words; ``None`` where nothing is.

    Args:
        value: As ``json.loads`` gives it.
        shape: What is expected.
        place: Its name, such as ``adapter.rank``.
    """
    if shape is None or value is None:
        return None
    if isinstance(shape, tuple):
        faults = [find_fault(value, each, place) for each in shape]
        deeper = (
            fault
            for each, fault in zip(shape, faults, strict=True)
            if isinstance(value, dict | list) and type(each) is type(value)
        )
        return None if None in faults else next(deeper, _word(value, shape, place))
    if isinstance(shape, dict) and isinstance(value, Mapping):
        return _find_in_object(value, shape, place)
    if isinstance(shape, list) and isinstance(value, list):
        places = [f"{place}[{number}]" for number in range(len(value))]
        found = (
            f"{at} is missing" if each is None else find_fault(each, shape[0], at)
            for at, each in zip(places, value, strict=True)
        )
        return next(filter(None, found), None)
    return None if _fits(value, shape) else _word(value, shape, place)


def _find_in_object(value: Mapping[str, Any], shape: dict[str, Any], place: str) -> str | None:
    inside = f"{place}." if place else ""
    needed = [key.removesuffix("!") for key in shape if key.endswith("!")]
    if "*!" in shape:
        needed = [*needed[:-1], *(key for key in value if key not in shape)]
    missing = [key for key in needed if value.get(key) is None]
    if missing:
        return f"{inside}{missing[0]} is missing"
    others = shape.get("*!", shape.get("*"))
    for key, each in value.items():
        fault = find_fault(each, shape.get(key, shape.get(f"{key}!", others)), f"{inside}{key}")
        if fault:
            return fault
    return None


def _fits(value: Any, shape: Shape) -> bool:
    if isinstance(shape, Positive):
        return _fits(value, shape.kind) and 0 < value <= shape.most
    if isinstance(shape, str):
        return bool(value == shape)
    if shape is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return math.isfinite(float(value))
        except OverflowError:  # whole numbers of JSON have no end
            return False
    if shape is int and isinstance(value, int) and abs(value) >= 2**63:
        return False
    return isinstance(shape, type) and isinstance(value, shape) and isinstance(value, bool) == (shape is bool)


def _word(value: Any, shape: Shape, place: str) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list"}
    found = kinds.get(type(value)) or json.dumps(value, ensure_ascii=False)
    return f"{place or 'it'} is {found if len(found) <= 40 else f'{found[:39]}…'}, expected {_word_shape(shape)}"


def _word_shape(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_word_shape(each) for each in shape)
    if isinstance(shape, Positive):
        return f"a positive {'whole ' if shape.kind is int else ''}number up to {shape.most:,}"
    if isinstance(shape, type):
        return _WORDS[shape]
    return shape if isinstance(shape, str) else "an object" if isinstance(shape, dict) else "a list"


def read_json_object(file: Path, remedy: str, shape: Shape = None) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        file: To read, in UTF-8.
        remedy: A sentence that ends the refusals: what to do with a file that is wrong.
        shape: What the object must look like.

    Raises:
        UserError: It cannot be read, is no JSON object, or has another shape.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON, or it is cut off ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}. {remedy}")
    check_shape(file, content, remedy, shape)
    return content


def check_shape(file: Path, content: dict[str, Any], remedy: str, shape: Shape) -> None:
    """Refuse an object that :func:`read_json_object` gave and that has another shape.

    For files of which something must be known first: which version wrote them, of which kind they are.

    Raises:
        UserError: It has another shape.
    """
    fault = find_fault(content, shape)
    if fault:
        raise UserError(f"{file} is damaged: {fault}. {remedy}")


class DuplicateKey(yaml.YAMLError):
    """A key appears twice in one mapping, which YAML forbids and PyYAML lets pass."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Look at the keys as they are written: what a merge key (``<<``) brings in may stand there again."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and name in lines:
                first = lines[name]
                places = f"twice in line {line}" if first == line else f"in line {first} and again in line {line}"
                raise DuplicateKey(f"the key {key.value!r} stands {places}, where the last would count: keep one")
            lines[name] = line
        return node


# A date stays text, as it was typed: jsonargparse reads it as any other value, and it is written as such again.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """Give what a YAML text holds.

    Raises:
        yaml.YAMLError: It is not YAML, or a key stands twice in it.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
