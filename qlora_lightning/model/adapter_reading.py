"""Reads an adapter folder: what it says it belongs to, and its tensors, onto a base."""

import json
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import peft
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.errors import UserError
from qlora_lightning.json_shape import Shape, find_fault
from qlora_lightning.model.adapter_shape import CONFIG, IDENTITY
from qlora_lightning.model.adapter_tensors import LOADING_FAULTS, read_tensors, word_misfit
from qlora_lightning.model.adapters import all_names_of_trainable_tensors, copy_matching, load_adapters
from qlora_lightning.model.checkpoint_format import check_version


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what an adapter folder says it belongs to; nothing where other tools wrote the folder.

    Raises:
        UserError: The folder is not a whole adapter folder with a LoRA in it, or a newer version wrote it.
    """
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not an adapter folder: expected adapter_config.json and adapter_model.safetensors in it, "
            f"missing {' and '.join(missing)}."
        )
    read_adapter_config(folder)  # told here, before a base is loaded
    file = folder / "qlora_lightning.json"
    identity = _read_json(file) if file.is_file() else {}
    version = identity.get("format_version", 1)
    check_version(version if isinstance(version, int) else 0, f"The adapter folder {folder}")
    _check_types(file, identity, IDENTITY)
    return {name: value for name, value in identity.items() if value is not None}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of an adapter folder that :func:`read_identity` has seen.

    Raises:
        UserError: It is not a JSON object, of another kind of adapter, or holds what no model can compute with.
    """
    config = _read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} holds an adapter of peft_type {kind}: expected LORA.")
    _check_types(folder / "adapter_config.json", config, CONFIG)
    return config


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


def _check_types(file: Path, content: dict[str, Any], shape: Shape) -> None:
    fault = find_fault(content, shape)
    if fault:
        raise UserError(f"{file} is damaged: {fault}. Copy the adapter folder again.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON, or it is cut off: {error}. Copy the adapter folder again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}.")
    return content
