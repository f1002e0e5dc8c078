"""Base and adapters put together: on a device, to train, or on torch's meta device, shapes without numbers."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_lightning.base.adapter_folder import find_adapter_folder, read_identity
from qlora_lightning.model.adapters.folder import fill_adapter, read_lora_config
from qlora_lightning.model.adapters.identity import check_identity, describe_adapter
from qlora_lightning.model.adapters.lora import ADAPTER, add_adapters, inject, trainable_tensors
from qlora_lightning.model.adapters.targets import layer_of
from qlora_lightning.model.layers.attention import register_flat_attention
from qlora_lightning.model.layers.fuse import fuse_layers
from qlora_lightning.model.load.base_model import Quantization, load_base


class LoadedModel(NamedTuple):
    """A base with adapters.

    Attributes:
        identity: What checkpoints and adapter folders say of the base and of the adapter's own shape.
        unfused: Whether something trains in PEFT's own layers.
    """

    model: peft.PeftModel
    identity: dict[str, Any]
    unfused: bool


def assemble_model(
    adapter: str | None, adapter_options: dict[str, Any], fast: bool, **base_options: Any
) -> LoadedModel:
    """Load a base by ``load_base``, and put new adapters on it or those of an adapter folder.

    ``adapter_options`` are those of :func:`~qlora_lightning.model.adapters.lora.add_adapters`.
    """
    folder = None if adapter is None else find_adapter_folder(adapter)
    stored = {} if folder is None else read_identity(folder)  # a misspelt name is reported before the base is loaded
    base, source, identity = load_base(**base_options)
    if folder is not None:
        check_identity(stored, identity, f"The adapter folder {folder}")
    model = put_adapters(base, folder, **adapter_options)
    # PEFT loads the base by this
    model.peft_config[ADAPTER].base_model_name_or_path = source.name if source.kind == "hub" else str(source.folder)
    identity["adapter"] = describe_adapter(model)
    return LoadedModel(model, identity, set_fast(model, fast))


def put_adapters(base: PreTrainedModel, folder: Path | None = None, **options: Any) -> peft.PeftModel:
    """Put new adapters on a base, or those of an adapter folder, whose own rank, alpha and targets apply.

    On a base on the meta device new adapters are shapes alone too; those of a folder have their numbers. ``options``
    are arguments of :func:`~qlora_lightning.model.adapters.lora.add_adapters`.
    """
    if folder is None:
        return add_adapters(base, **options)
    model = inject(base, read_lora_config(folder))
    fill_adapter(model, folder)
    return model


def set_fast(model: peft.PeftModel, fast: bool) -> bool:
    """Let layers run fused if they can and ``fast`` is set; return whether something trains in PEFT's own layers."""
    if not fast:
        model.get_base_model().set_attn_implementation(register_flat_attention(fast=False))
        return True
    beside = any(".lora_" not in name for name in trainable_tensors(model))
    return any(fuse_layers(model).linears.values()) or beside


def meta_base(config: Any, dtype: torch.dtype = torch.float32, quantization: Quantization = "none") -> PreTrainedModel:
    """Make a frozen base of shapes alone, on the meta device; only the rotary tables are real.

    Args:
        config: transformers' config, or the folder that holds it.
        dtype: Of all that is not quantized.
        quantization: How the linears of the decoder layers are stored, whatever the config says.
    """
    is_folder = isinstance(config, Path)
    config = AutoConfig.from_pretrained(config, local_files_only=True) if is_folder else copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=register_flat_attention()
        )
        if quantization != "none":
            for name, linear in list(model.named_modules()):
                if isinstance(linear, nn.Linear) and layer_of(name) is not None:
                    model.set_submodule(name, _quantized_linear(linear, quantization, dtype))
            model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization != "int8"
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):  # Gemma 3's, a number in a buffer
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    model.requires_grad_(False)
    return model


def _quantized_linear(linear: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> nn.Module:
    """Make a linear of bitsandbytes; its weight is as transformers' loading leaves it."""
    weight, sizes = linear.weight.detach(), (linear.in_features, linear.out_features, linear.bias is not None)
    quantized: Any
    if quantization == "int8":
        quantized = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        quantized.weight = bnb.nn.Int8Params(rows, requires_grad=False, CB=rows, SCB=scales)
    else:
        quantized = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type=quantization)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type=quantization)
        quantized.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, quant_type=quantization, bnb_quantized=True
        )
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.detach())
    return quantized  # type: ignore[no-any-return]
