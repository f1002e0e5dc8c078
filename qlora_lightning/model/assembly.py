"""Base and adapters put together: the model that QLoRA trains, and a record of what it was made from."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from qlora_lightning.errors import UserError
from qlora_lightning.model.adapter_folder import read_identity
from qlora_lightning.model.adapters import add_adapters, load_adapters, trainable_tensors
from qlora_lightning.model.linear import fuse_lora_linears
from qlora_lightning.model.quantized import Quantization, load_base
from qlora_lightning.model.resume import check_identity


@dataclass(frozen=True)
class QLoRAModel:
    """A model ready to train.

    Attributes:
        model: The frozen base with adapters that require gradients.
        identity: Name, folder, fingerprint and quantization of the base: checkpoints and adapter folders carry it.
        unfused: Names of what trains in PEFT's own layers: unfused LoRA, whole modules, tokens.
    """

    model: peft.PeftModel
    identity: dict[str, Any]
    unfused: list[str]


def assemble_model(
    base: str,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: Quantization,
    double_quant: bool,
    revision: str | None,
    trust_remote_code: bool,
    cache: bool,
    adapter: str | None,
    adapter_options: dict[str, Any],
    fast: bool,
) -> QLoRAModel:
    """Load a base, and put new adapters on it or those of an adapter folder.

    Args:
        base: See :func:`qlora_lightning.model.quantized.load_base`, as for all down to ``cache``.
        device: Likewise.
        compute_dtype: Likewise.
        quantization: Likewise.
        double_quant: Likewise.
        revision: Likewise.
        trust_remote_code: Likewise.
        cache: Likewise.
        adapter: Adapter folder to go on with, or ``None`` for new adapters.
        adapter_options: Arguments of :func:`qlora_lightning.model.adapters.add_adapters`.
        fast: Whether LoRA linears may be fused.

    Raises:
        UserError: The base, the adapter folder or an option cannot be used, or the adapter belongs to another base.
    """
    loaded = load_base(
        base,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        cache=cache,
        device=device,
    )
    identity = {
        "base": base,
        "base_folder": str(loaded.source.folder),
        "revision": loaded.source.revision,
        "fingerprint": loaded.fingerprint,
        "quantization": quantization,
        "double_quant": loaded.double_quant,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
    if adapter is None:
        model = add_adapters(loaded.model, base_name=loaded.loadable_name, **adapter_options)
    else:
        check_identity(read_identity(Path(adapter)), identity, f"The adapter folder {adapter}")
        model = load_adapters(loaded.model, adapter)
        _check_options(model.peft_config["default"], adapter_options, adapter)
    trainable = trainable_tensors(model)
    unfused = fuse_lora_linears(model) if fast else list(trainable)
    unfused += [name for name in trainable if ".lora_" not in name]
    return QLoRAModel(model, identity, unfused)


def _check_options(config: peft.LoraConfig, options: dict[str, Any], folder: str) -> None:
    """Refuse options that contradict the adapter that training goes on with: they would be ignored."""
    defaults = inspect.signature(add_adapters).parameters
    for name, own in (("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
        asked, stored = options[name], getattr(config, own)
        if asked not in (defaults[name].default, stored):
            raise UserError(
                f"model.{name} is {asked}, but the adapter in {folder} has {stored}, and training goes on with that: "
                f"leave model.{name} out, or train a new adapter without model.adapter."
            )
