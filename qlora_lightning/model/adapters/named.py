"""A second adapter beside a model's own, to judge and to answer with."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft

from qlora_lightning.base.adapter_folder import read_identity
from qlora_lightning.model.adapters.identity import check_identity
from qlora_lightning.model.adapters.reading import LOADING_FAULTS, read_tensors, word_misfit
from qlora_lightning.model.layers.fusing import fuse_layers
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import without_peft_warnings


def add_named_adapter(
    model: peft.PeftModel, name: str, folder: Path, identity: Mapping[str, Any], fast: bool = True
) -> bool:
    """Put the adapter of a folder beside those that a model has; ``model.set_adapter(name)`` then switches to it.

    Args:
        model: The base with an adapter.
        name: What the new one is called.
        folder: Its adapter folder.
        identity: Of the base: what it is, and how it is quantized.
        fast: Whether linears may run fused.

    Returns:
        Whether all of its linears run fused; the others need autocast.

    Raises:
        UserError: It belongs to another base, or does not fit this one.
    """
    of_base = {key: value for key, value in identity.items() if key != "adapter"}  # its shape may be another
    check_identity(read_identity(folder), of_base, f"The adapter folder {folder}")
    read_tensors(folder)  # PEFT would take NaN without a word
    device = next(model.parameters()).device
    try:
        with without_peft_warnings(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
            result = model.load_adapter(str(folder), name, torch_device=str(device))
    except LOADING_FAULTS as error:
        raise word_misfit(folder, error) from error
    missing = [key for key in result.missing_keys if f".{name}." in key]  # PEFT's own filter takes others' for its own
    lost = [*missing, *result.unexpected_keys]
    if lost:
        raise UserError(
            f"The adapter folder {folder} does not fit this base: {len(missing)} tensors are missing in it "
            f"and {len(result.unexpected_keys)} are foreign ({', '.join(lost[:3])}, …)."
        )
    return fast and not fuse_layers(model)
