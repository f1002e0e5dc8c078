"""A model of shapes alone, whose weights are filled in part by part, so that the whole is never in memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_lightning.model.adapters.reading import open_adapter_folder
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.weights.base_weights import Weights

# What PEFT puts between the name of a module and its own weights.
_WRAPPED = (".base_layer", ".original_module", ".token_adapter")


def make_skeleton(folder: Path) -> PreTrainedModel:
    """Make the model that a folder's ``config.json`` describes, on the meta device; only the rotary tables are real."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # linears of shapes alone are plain ones
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=register_flat_attention()
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.requires_grad_(False)
    return model.eval()


def put_adapter_on(skeleton: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Put the adapter of a folder on a skeleton: the adapter's own tensors are real.

    Raises:
        UserError: The folder does not fit the base.
    """
    model = open_adapter_folder(skeleton, folder, bare=True)
    return model.requires_grad_(False).eval()


def name_in_base(name: str) -> str:
    """Give the name that a tensor of the base has without PEFT's wrappers."""
    for part in _WRAPPED:
        name = name.replace(part, "")
    return name


@contextlib.contextmanager
def filled(module: nn.Module, prefix: str, weights: Weights, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Hold a part's weights in memory for a while.

    Args:
        module: The part, whose tensors without values are filled.
        prefix: Its name in the base.
        weights: Gives the tensors by their names in the base.
        dtype: Of what is filled in; ``None`` leaves it as it comes.
    """
    empty: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                empty.append((owner, name, parameter))
                full = ".".join(part for part in (prefix, path, name) if part)
                value = weights(name_in_base(full))
                owner.register_parameter(name, nn.Parameter(value.to(dtype or value.dtype), requires_grad=False))
    try:
        yield
    finally:
        for owner, name, parameter in empty:
            owner.register_parameter(name, parameter)
