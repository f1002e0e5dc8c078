"""Base and adapters put together: the model that QLoRA trains, and a record of what it was made from."""

from dataclasses import dataclass
from typing import Any

import peft
import torch

from qlora_lightning.adapter.identity import read_identity
from qlora_lightning.adapter.place import find_adapter_folder
from qlora_lightning.base.cache_entry import EntryCheck
from qlora_lightning.model.adapters.identity import check_identity, describe_adapter, hash_config
from qlora_lightning.model.adapters.lora import add_adapters, trainable_tensors
from qlora_lightning.model.adapters.options import check_adapter_options, chosen_targets
from qlora_lightning.model.adapters.reading import open_adapter_folder
from qlora_lightning.model.kept_base import lend_base
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.layers.decoder_layer import fuse_decoder_layers
from qlora_lightning.model.layers.linear import fuse_lora_linears
from qlora_lightning.model.quantized import Quantization, QuantizedBase, load_base


@dataclass(frozen=True)
class QLoRAModel:
    """A model ready to train.

    Attributes:
        model: The frozen base with adapters that require gradients.
        identity: Name, folder, fingerprint, config and quantization of the base, and the adapter's own shape:
            checkpoints and adapter folders carry it.
        unfused: Names of what trains in PEFT's own layers: unfused LoRA, whole modules, tokens.
        check: Of a large base from the cache, which may still be running; see :func:`load_base`.
    """

    model: peft.PeftModel
    identity: dict[str, Any]
    unfused: list[str]
    check: EntryCheck | None


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
    check_later: bool = False,
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
        adapter: Adapter folder to go on with, or the run folder around it; ``None`` for new adapters.
        adapter_options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`.
        fast: Whether layers may run fused.
        check_later: See :func:`qlora_lightning.model.quantized.load_base`.

    Raises:
        UserError: The base, the adapter folder or an option cannot be used, or the adapter belongs to another base.
    """
    folder = None if adapter is None else find_adapter_folder(adapter)
    stored = {} if folder is None else read_identity(folder)  # a misspelt name is told before the base is loaded
    asked: dict[str, Any] = {
        "name": base,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "quantization": quantization,
        "double_quant": double_quant,
        "compute_dtype": compute_dtype,
        "cache": cache,
        "device": device,
    }
    loaded: QuantizedBase = lend_base(asked, lambda: load_base(**asked, check_later=check_later))
    identity: dict[str, Any] = {
        "base": base,
        "base_folder": str(loaded.source.folder),
        "revision": loaded.source.revision,
        "fingerprint": loaded.fingerprint,
        "config_hash": hash_config(loaded.model.config),
        "quantization": quantization,
        "double_quant": loaded.double_quant,
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
    if folder is None:
        model = add_adapters(loaded.model, base_name=loaded.loadable_name, **adapter_options)
    else:
        check_identity(stored, identity, f"The adapter folder {folder}")
        targets = chosen_targets(loaded.model, adapter_options)
        model = open_adapter_folder(loaded.model, folder)
        check_adapter_options(model, targets, adapter_options, str(folder))
        identity["trained_from"] = {"adapter": str(folder), "data": stored.get("data", {})}
    identity["adapter"] = describe_adapter(model)
    trainable = trainable_tensors(model)
    unfused = fuse_lora_linears(model) if fast else list(trainable)
    if fast:
        fuse_decoder_layers(model)
    else:
        model.get_base_model().set_attn_implementation(register_flat_attention(fast=False))
    unfused += [name for name in trainable if ".lora_" not in name]
    return QLoRAModel(model, identity, unfused, loaded.check)
