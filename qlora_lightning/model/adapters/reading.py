"""Puts the tensors of an adapter folder onto a base, checked."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.base.tensors import read_spans
from qlora_lightning.model.adapters.lora import all_names_of_trainable_tensors, copy_matching, load_adapters
from qlora_lightning.support.errors import UserError

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


def word_misfit(folder: Path, error: Exception) -> UserError:
    """Say why an adapter folder cannot be put on a base, in the last line of what PEFT said."""
    reason = " ".join(str(error).strip().splitlines()[-1:]).strip().rstrip(".")
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


def open_adapter_folder(base: PreTrainedModel, folder: Path, *, bare: bool = False) -> peft.PeftModel:
    """Put the adapter of a folder on the base, to go on training it; every tensor must find its place.

    Args:
        base: The base.
        folder: The adapter folder.
        bare: The base has shapes alone (it lies on the meta device); the adapter gets its tensors all the same.

    Raises:
        UserError: The folder does not fit the base, or a file in it is damaged.
    """
    stored = read_tensors(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
            model = load_adapters(base, str(folder), bare=bare)
    except LOADING_FAULTS as error:
        raise word_misfit(folder, error) from error
    own = _tensors_by_key(model)
    _check_keys(own.keys(), stored.keys(), folder)
    if bare:
        _fill(model, all_names_of_trainable_tensors(model), own, stored)
    return model


def fill_adapter(model: nn.Module, folder: Path) -> None:
    """Give the adapter that a model has the tensors of a folder; every one must find its place.

    Args:
        model: With an adapter of the folder's kind, however it was made.
        folder: The adapter folder.

    Raises:
        UserError: The folder does not fit the model, or a file in it is damaged.
    """
    stored = read_tensors(folder)
    if not isinstance(model, peft.PeftModel):
        raise UserError(
            f"The adapter folder {folder} cannot be put on a {type(model).__name__}: build_model must return a model "
            "of PEFT, with adapters."
        )
    own = _tensors_by_key(model)
    _check_keys(own.keys(), stored.keys(), folder)
    remedy = "Build it with the rank that it was trained with."
    copy_matching(own, stored, f"The adapter folder {folder} does not fit this adapter", remedy)


def check_folder_fits(model: peft.PeftModel, folder: Path) -> None:
    """See by the header of its file that an adapter folder fits a model; no number is read.

    Args:
        model: With an adapter as the folder's config describes it; it may lie on the meta device.
        folder: The adapter folder.

    Raises:
        UserError: It does not fit, or its file is cut off.
    """
    own, stored = _tensors_by_key(model), read_shapes(folder)
    _check_keys(own.keys(), stored.keys(), folder)
    check_shapes(folder, stored, {name: tensor.shape for name, tensor in own.items()})


def _tensors_by_key(model: peft.PeftModel) -> dict[str, Tensor]:
    tensors: dict[str, Any] = dict(all_names_of_trainable_tensors(model))
    own: dict[str, Tensor] = peft.get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    return own


def _check_keys(own: Set[str], stored: Set[str], folder: Path) -> None:
    if own != stored:
        shown = ", ".join(sorted(own ^ stored)[:3])
        raise UserError(
            f"The adapter folder {folder} does not fit this base: {len(own - stored)} tensors are missing in it "
            f"and {len(stored - own)} are foreign ({shown}, …). Name the base that it was trained on."
        )


def _fill(
    model: peft.PeftModel, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> None:
    """Give an adapter of shapes its tensors, which PEFT leaves where the base is."""
    keys = {id(tensor): key for key, tensor in own.items()}
    values = {name: stored[keys[id(tensor)]].float() for name, tensor in tensors.items() if id(tensor) in keys}
    model.load_state_dict(values, strict=False, assign=True)
