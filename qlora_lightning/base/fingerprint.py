"""A base's fingerprint: which numbers it holds, however they are cut into files."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qlora_lightning.base.cache import Json, cache_root, hash_key
from qlora_lightning.base.folder import weight_files
from qlora_lightning.base.tensors import TensorSpan, read_spans
from qlora_lightning.support.files import write_whole

_FORMAT = 1  # raised whenever the same tensors would give another fingerprint
_CHUNK_BYTES = 4 << 20
_THREADS = 4  # hashlib lets go of the interpreter's lock; more threads than disks feed gain nothing


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a transformers folder's weights: names, dtypes, shapes and bytes of all tensors.

    It does not depend on sharding or on other files. The result is kept in the cache under the files' paths, sizes
    and times; if the cache cannot be written, it is computed each time. A few MB of memory are enough.

    Raises:
        UserError: the folder holds no whole safetensors weights.
    """
    files = weight_files(folder, str(folder))
    stats = [(file.resolve(), file.stat()) for file in files]
    key: dict[str, Json] = {
        "format": _FORMAT,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    }
    kept = cache_root() / "fingerprints" / f"{hash_key(key)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(kept.read_text(encoding="utf-8"))["fingerprint"])
    spans = sorted((span for file in files for span in read_spans(file)), key=lambda span: span.name)
    total = hashlib.sha256(f"qlora_lightning fingerprint {_FORMAT}\n".encode())
    with ThreadPoolExecutor(_THREADS) as pool:
        for span, digest in zip(spans, pool.map(_hash_span, spans), strict=True):
            total.update(json.dumps([span.name, span.dtype, span.shape, digest]).encode())
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps({"fingerprint": total.hexdigest(), **key}, indent=2) + "\n")
    return total.hexdigest()


def _hash_span(span: TensorSpan) -> str:
    digest = hashlib.sha256()
    # Read, not mapped: mapped pages of 16 GB would all count as resident while the loop runs over them.
    with span.file.open("rb") as stream:
        stream.seek(span.start)
        for done in range(0, span.size_bytes, _CHUNK_BYTES):
            digest.update(stream.read(min(_CHUNK_BYTES, span.size_bytes - done)))
    return digest.hexdigest()
