"""A base's fingerprint: which numbers it holds, however they are cut into files."""

import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qlora_lightning.base.cache import Json, cache_root, hash_key
from qlora_lightning.base.folder import weight_files
from qlora_lightning.base.tensors import TensorSpan, read_spans
from qlora_lightning.support.errors import UserError

_FORMAT = 1  # raised whenever the same tensors would give another fingerprint
_CHUNK_BYTES = 4 << 20
_THREADS = 4  # hashlib lets go of the interpreter's lock; more threads than disks feed gain nothing


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a transformers folder's weights: names, dtypes, shapes and bytes of all tensors.

    It does not depend on sharding or on other files. The result is kept in the cache under the files' paths, sizes
    and times; where the cache cannot be written, it is computed each time. A few MB of memory are enough.

    Raises:
        UserError: the folder holds no whole safetensors weights.
    """
    files = weight_files(folder, str(folder))
    key = _key(files)
    kept = cache_root() / "fingerprints" / f"{hash_key(key)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(kept.read_text(encoding="utf-8"))["fingerprint"])
    result = _hash_tensors(files)
    with suppress(OSError):
        _keep(kept, {"fingerprint": result, **key})
    return result


def _key(files: list[Path]) -> dict[str, Json]:
    stats = [(file.resolve(), file.stat()) for file in files]
    return {"format": _FORMAT, "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]}


def _hash_tensors(files: list[Path]) -> str:
    spans = sorted((span for file in files for span in read_spans(file)), key=lambda span: span.name)
    for first, second in itertools.pairwise(spans):
        if first.name == second.name:
            raise UserError(
                f"{first.file.parent}: expected each tensor once, found {first.name} in {first.file.name} and in "
                f"{second.file.name}. Download or save the base again."
            )
    total = hashlib.sha256(f"qlora_lightning fingerprint {_FORMAT}\n".encode())
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for span, digest in zip(spans, pool.map(_hash_span, spans), strict=True):
            total.update(json.dumps([span.name, span.dtype, span.shape, digest]).encode())
    return total.hexdigest()


def _hash_span(span: TensorSpan) -> str:
    digest = hashlib.sha256()
    # Read, not mapped: mapped pages of 16 GB would all count as resident while the loop runs over them.
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, span.size_bytes)))
    left = span.size_bytes
    with span.file.open("rb", buffering=0) as stream:
        stream.seek(span.start)
        while left:
            count = stream.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise UserError(f"{span.file} became shorter while it was read. Download or save it again.")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _keep(file: Path, content: dict[str, Json]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)  # at once, so that a reader never sees half a file
