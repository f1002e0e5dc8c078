"""Puts the tensors of an adapter folder onto a base."""

import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import peft
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lightning.errors import UserError
from qlora_lightning.model.adapters.lora import all_names_of_trainable_tensors, copy_matching, load_adapters
from qlora_lightning.model.adapters.tensors import LOADING_FAULTS, check_shapes, read_shapes, read_tensors, word_misfit


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
