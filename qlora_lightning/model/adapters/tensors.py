"""The tensors of an adapter folder: written with a hash, refused if they are damaged or hold NaN."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_lightning.base.safetensors_header import read_spans
from qlora_lightning.errors import UserError

LOADING_FAULTS = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)
_HASH = "sha256"  # the key of the metadata


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors on the CPU as safetensors, with their hash in the file's metadata: one rename replaces both.

    PEFT's ``save_pretrained`` leaves the hash out, so that an adapter which was trained further by it is not called
    damaged. Equal tensors give equal files.

    Raises:
        OSError, SafetensorError: The disk is full or fails.
    """
    save_file(dict(tensors), file, {"format": "pt", _HASH: _hash_tensors(tensors)})
    with file.open("r+b") as stream:  # safetensors writes the metadata in an order that differs from run to run
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder, by PEFT's names.

    Raises:
        UserError: The file is cut off, its tensors do not match their hash, or one holds NaN or an infinite number:
            every answer would be nonsense.
    """
    file = folder / "adapter_model.safetensors"
    with file.open("rb"):  # safetensors would say of a file that may not be read that it is missing
        pass
    try:
        with safe_open(file, framework="pt") as opened:
            expected = (opened.metadata() or {}).get(_HASH)  # other tools write none
            names = opened.keys()
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a whole safetensors file, but cut off or damaged ({error}). Copy the adapter folder again."
        ) from error
    if expected is not None and _hash_tensors(tensors) != expected:
        raise UserError(
            f"{file} is damaged: its tensors do not match the hash in its metadata. Copy the adapter folder again."
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"The adapter folder {folder} is damaged: {bad:,} of {tensor.numel():,} values of {name} are NaN or "
                "infinite. Copy the folder again, or train again with a lower learning rate."
            )
    return tensors


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and numbers, whatever their order."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors of an adapter folder, by PEFT's names; no number is read.

    Raises:
        UserError: The file is cut off.
    """
    return {span.name: span.shape for span in read_spans(folder / "adapter_model.safetensors")}


_MISMATCH = re.compile(
    r"size mismatch for (?P<name>\S+): copying a param with shape torch\.Size\((?P<found>\[[\d, ]*\])\) from "
    r"checkpoint, the shape in current model is torch\.Size\((?P<wanted>\[[\d, ]*\])\)"
)


def word_misfit(folder: Path, error: Exception) -> UserError:
    """Say why an adapter folder cannot be put on a base, in the last line of what PEFT said."""
    reason = " ".join(str(error).strip().splitlines()[-1:]).strip().rstrip(".")
    if mismatch := _MISMATCH.search(reason):
        reason = _word_shapes(mismatch["name"], mismatch["found"], mismatch["wanted"])
    return _misfit(folder, reason)


def check_shapes(folder: Path, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors of other shapes than the model's.

    Args:
        folder: The adapter folder.
        found: In its file, by name.
        wanted: In the model, by the same names.

    Raises:
        UserError: There is one.
    """
    for name, shape in wanted.items():
        if list(found[name]) != list(shape):
            raise _misfit(folder, _word_shapes(name, list(found[name]), list(shape)))


def _word_shapes(name: str, found: object, wanted: object) -> str:
    return f"{name} is {found} in the file, where this base and adapter_config.json want {wanted}"


def _misfit(folder: Path, reason: str) -> UserError:
    return UserError(
        f"The adapter folder {folder} cannot be put on this base: {reason}. Name the base that "
        "it was trained on, or copy the folder again if a file in it is damaged."
    )
