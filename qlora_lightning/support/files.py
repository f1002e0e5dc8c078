"""Writes files and folders whole or not at all; reads JSON and YAML with clear errors for damaged or ambiguous ones."""

import contextlib
import errno
import json
import os
import re
import reprlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from qlora_lightning.support.errors import UserError, bounded
from qlora_lightning.support.values import fits

# The names in a run folder.
CONFIG, METRICS, MANIFEST = "config.yaml", "metrics.csv", "manifest.json"
EVALUATION, PREDICTIONS, PAGE = "evaluation.json", "predictions.jsonl", "report.html"
UNFINISHED_PREDICTIONS = "predictions.unfinished.jsonl"  # answers as they come
CHECKPOINTS, LAST, ADAPTER_FOLDER = "checkpoints", "last.ckpt", "adapter"
EXTRA = "extra.safetensors"  # in the adapter folder: what a subclass trained beside the adapter
IDENTITY, CARD = "qlora_lightning.json", "README.md"  # in the adapter folder; the hub's models have a card too
MERGE_RECORD = "merge.json"  # in every folder that `merge` has written
FORMAT_VERSION = 1  # of checkpoints and adapter folders
MEMORY_PEAKS = ("memory_peak_gib", "peak_rss_gib")  # metrics: of a GPU, and of a process

_CONTROLS = re.compile("[\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")  # JSON escapes those below 0x20 itself


def write_whole(file: Path, content: str | bytes | Mapping[str, Any]) -> None:
    """Write a small file so that a crash leaves, and a reader finds, the old or the new one, never half.

    A mapping is written as JSON. The file's folder is made. A link or a pipe is replaced and not followed: in a folder
    from elsewhere a link may lead to any file of the user, and a pipe may have no reader. Only those of the system, as
    ``/dev/stdout``, are written to.

    Raises:
        OSError: The disk is full or fails, or the pipe is closed.
    """
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"  # a config may hold dates
        content = _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", content)  # it may be printed
    # a file name may hold bytes that are not UTF-8, which Python keeps as lone surrogates
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    if file.is_relative_to("/dev"):
        with naming_file(file), file.open("ab") as stream:
            stream.write(data)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, file.with_name(f".unfinished-{os.getpid()}-{file.name}")) as stream:
        stream.write(data)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed inside :func:`write_whole` have left in a folder."""
    for file in folder.glob(".unfinished-[0-9]*-*"):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(file: Path, unfinished: Path) -> Iterator[BinaryIO]:
    """Yield a stream that writes ``unfinished``, which at the end gets the name ``file``; if it fails, nothing does."""
    unfinished.unlink(missing_ok=True)  # of a process that was killed
    try:
        with naming_file(file), unfinished.open("xb") as stream:  # "x" follows no link
            yield stream
        put_in_place(unfinished, file)
    except BaseException:  # Ctrl-C too
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(target: Path, record: str) -> Iterator[Path]:
    """Yield an empty folder that at the end gets the name ``target``; if it fails, nothing does.

    An earlier folder of that name is replaced only if it holds the file ``record``, by which its kind is known.

    Raises:
        OSError: The disk is full or fails, or another folder of that name has files.
    """
    folder = Path(os.path.realpath(target))
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with naming_file(target):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            for file in unfinished.rglob("*"):
                if file.is_file():
                    flush(file)  # otherwise a crash of the machine could leave the name with empty files
            if (folder / record).is_file():
                shutil.rmtree(folder)
            os.replace(unfinished, folder)  # fails if another process has filled a folder of that name
            flush(folder.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def format_json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def append_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines and close it: a killed process loses none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming_file(file), file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(format_json_lines(rows))


def name_earlier(file: Path) -> Path:
    """Return the name under which :func:`set_aside` keeps a file."""
    return file.with_name(f"earlier-{file.name}")


def resolve_unnamed(folder: Path) -> Path:
    """Return a folder by a path that ends in its name, which ``.`` does not, so that names can be made of it."""
    return folder if folder.name else folder.resolve()


def set_aside(file: Path) -> Path:
    """Rename a file that an earlier run or a user has left to ``earlier-…``; return the new path."""
    earlier = name_earlier(file)
    if file.exists() or file.is_symlink():  # a link that leads nowhere yet would be followed by who writes
        os.replace(file, earlier)
    return earlier


def set_usual_mode(file: Path) -> None:
    """Set the mode that the umask implies: files of safetensors are readable by their owner only."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def put_in_place(unfinished: Path, target: Path) -> None:
    """Flush a written file and rename it to ``target``, whose old file stays until then."""
    flush(unfinished)
    os.replace(unfinished, target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until the disk has the content of a file, or the names in a folder."""
    if os.name == "nt":  # Windows flushes only by the handle that wrote, and no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network mounts may not flush a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the path that is written to the error of a full disk, which names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def raising_os_errors() -> Iterator[None]:
    """Turn the errors that safetensors and tokenizers raise if a file cannot be written into an ``OSError``."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error


def check_plain_files(folder: Path) -> None:
    """Reject a folder from elsewhere with a pipe, a device or a link to one: a library would read it for ever."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is a pipe or a device: expected plain files. Remove it.", "folder.pipe")


def read_json_object(file: Path, remedy: str, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a file that holds a JSON object, whose ``keys`` are checked; ``remedy`` ends the error for a damaged one."""
    try:
        with bounded(f"{file} cannot be read", file.name):
            content = json.loads(file.read_text(encoding="utf-8-sig"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON, or it is cut off ({error}). {remedy}", file.name) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}. {remedy}", file.name)
    check_keys(content, keys or {}, str(file), remedy)
    return content


def check_keys(content: Mapping[str, Any], keys: Mapping[str, Any], source: str, remedy: str) -> None:
    """Check what a file holds by its keys; ``source`` begins and ``remedy`` ends the error.

    A key has a type hint, a ``range``, or the keys of the object that it holds. It may be missing if it may be null.
    """
    for key, hint in keys.items():
        value = content.get(key)
        if isinstance(hint, Mapping) and isinstance(value, Mapping | None):
            check_keys(value or {}, hint, f"{source}: {key}", remedy)
        elif isinstance(hint, Mapping) or not fits(value, hint):
            found = "missing" if value is None else reprlib.repr(value)
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            expected = "object" if isinstance(hint, Mapping) else expected
            message = f"{source}: {key} is {found}, expected {expected.removeprefix('typing.')}. {remedy}"
            raise UserError(message, key)


class _Loader(yaml.SafeLoader):
    """Rejects a duplicate key in a mapping, which YAML forbids and PyYAML accepts."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # before merge keys (<<) are resolved
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"the key {name!r} is in line {lines[name]} and again in line {line}: keep one")
            lines[name] = line
        return node


# A date stays the text that was typed: jsonargparse reads it as any other value.
_Loader.yaml_implicit_resolvers = {
    character: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        yaml.YAMLError: It is not YAML, is nested too deeply, or has a duplicate key.
    """
    try:
        return _Loader(text).get_single_data()
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def load_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or has an object with a key twice, of which Python's parser
            would take the last.
    """
    try:
        return json.loads(text, object_pairs_hook=_make_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is there twice")
    return values


def check_version(version: int, source: str) -> None:
    """Reject a format that a newer version of this package wrote."""
    if version > FORMAT_VERSION:
        raise UserError(
            f"{source} has format version {version}, and this version of qlora_lightning reads up to {FORMAT_VERSION}: "
            "update qlora_lightning.",
            "format_version",
        )
