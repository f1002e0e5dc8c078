"""A model with its adapters as training would assemble it, on torch's meta device: shapes without numbers."""

from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from qlora_lightning.adapter.identity import read_identity
from qlora_lightning.adapter.place import find_adapter_folder
from qlora_lightning.model.adapters.lora import add_adapters
from qlora_lightning.model.adapters.options import check_adapter_options, chosen_targets
from qlora_lightning.model.adapters.reading import check_folder_fits
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.adapters.tensors import LOADING_FAULTS, word_misfit
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.layers.decoder_layer import fuse_decoder_layers
from qlora_lightning.model.layers.linear import fuse_lora_linears
from qlora_lightning.model.quantized import Quantization
from qlora_lightning.support.versions import without_peft_warnings


def build_skeleton(
    config: Any,
    *,
    compute_dtype: torch.dtype,
    quantization: Quantization,
    adapter: str | None,
    adapter_options: dict[str, Any],
    fast: bool,
) -> peft.PeftModel:
    """Assemble a model by the functions of :func:`qlora_lightning.model.assembly.assemble_model`, weightless.

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
        fuse_lora_linears(adapted)
        fuse_decoder_layers(adapted)
    return adapted


def _has_dora(folder: Path | None, options: dict[str, Any]) -> bool:
    if folder is None:
        return bool((options.get("lora_options") or {}).get("use_dora"))
    return bool(_read_folder(folder).use_dora)


def _read_folder(folder: Path) -> peft.LoraConfig:
    read_identity(folder)  # words a misspelt name
    settings = peft.LoraConfig.from_pretrained(str(folder))
    settings.base_model_name_or_path, settings.inference_mode = None, False
    return cast(peft.LoraConfig, settings)


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
    settings = _read_folder(folder)
    try:
        with without_peft_warnings():
            adapted = cast(peft.PeftModel, peft.get_peft_model(model, settings))
    except LOADING_FAULTS as error:
        raise word_misfit(folder, error) from error
    check_adapter_options(adapted, targets, options, str(folder))
    check_folder_fits(adapted, folder)
    return adapted
