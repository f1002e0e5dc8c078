"""Base and adapters put together: to train, or on torch's meta device, shapes without numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.base.cache import EntryCheck
from qlora_lightning.model.adapters.folder import check_folder_fits, open_adapter_folder, read_lora_config
from qlora_lightning.model.adapters.identity import (
    check_adapter_options,
    check_identity,
    chosen_targets,
    describe_adapter,
    hash_config,
)
from qlora_lightning.model.adapters.lora import add_adapters, inject, trainable_tensors
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.base_model import Quantization, QuantizedBase, lend_base, load_base
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.layers.fusing import fuse_layers


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
        base: See :func:`qlora_lightning.model.base_model.load_base`, as for all down to ``cache``.
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
        check_later: See :func:`qlora_lightning.model.base_model.load_base`.

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
    unfused = fuse_layers(model) if fast else list(trainable)
    if not fast:
        model.get_base_model().set_attn_implementation(register_flat_attention(fast=False))
    unfused += [name for name in trainable if ".lora_" not in name]
    return QLoRAModel(model, identity, unfused, loaded.check)


def build_skeleton(
    config: Any,
    *,
    compute_dtype: torch.dtype,
    quantization: Quantization,
    adapter: str | None,
    adapter_options: dict[str, Any],
    fast: bool,
) -> peft.PeftModel:
    """Assemble a model by the functions of :func:`qlora_lightning.model.build.assemble_model`, weightless.

    Linears that would be stored quantized are of the class that stores them so; their shapes are those of the numbers
    that they stand for.

    Args:
        config: transformers' config of the base.
        compute_dtype: Of the products, the embedding, the norms and the head.
        quantization: How the linears are stored.
        adapter: Adapter folder to go on with, or ``None``.
        adapter_options: Arguments of :func:`qlora_lightning.model.adapters.lora.add_adapters`.
        fast: Whether layers may run fused.

    Raises:
        UserError: The adapter folder or an option cannot be used.
    """
    with torch.device("meta"), no_init_weights():  # there are no numbers to initialize
        attention = register_flat_attention(fast)
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype, attn_implementation=attention)
        model.tie_weights()  # which was to come with the initialization
        model.requires_grad_(False)
        folder = None if adapter is None else find_adapter_folder(adapter)
        if not _has_dora(folder, adapter_options):  # which PEFT measures weights for, in the making
            _quantize(model, quantization, compute_dtype)
        adapted = _adapt(model, folder, adapter_options)
    if fast:
        fuse_layers(adapted)
    return adapted


def _has_dora(folder: Path | None, options: dict[str, Any]) -> bool:
    if folder is None:
        return bool((options.get("lora_options") or {}).get("use_dora"))
    return bool(read_lora_config(folder).use_dora)


def _quantize(model: PreTrainedModel, quantization: Quantization, compute_dtype: torch.dtype) -> None:
    if quantization == "none":
        return
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and layer_of(name) is not None:
            shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
            made = (
                bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
                if quantization == "int8"
                else bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=compute_dtype, quant_type=quantization)
            )
            made.to(compute_dtype).requires_grad_(False)
            model.set_submodule(name, made)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization != "int8"  # PEFT asks


def _adapt(model: PreTrainedModel, folder: Path | None, options: dict[str, Any]) -> peft.PeftModel:
    if folder is None:
        return add_adapters(model, **options)
    targets = chosen_targets(model, options)
    adapted = inject(model, read_lora_config(folder))
    check_adapter_options(adapted, targets, options, str(folder))
    check_folder_fits(adapted, folder)
    return adapted
