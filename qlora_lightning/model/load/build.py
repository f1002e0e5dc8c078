"""Put base and adapters together, for training or as shapes without numbers."""

import hashlib
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from lightning import Callback, LightningModule, Trainer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_lightning.model.adapters.folder import fill_adapter, read_lora_config, settings_of_folder
from qlora_lightning.model.adapters.identity import check_identity, describe_adapter
from qlora_lightning.model.adapters.inject import (
    ADAPTER,
    count_parameters,
    frozen_models,
    inject,
    new_lora_config,
    own_tensors,
    trainable_tensors,
)
from qlora_lightning.model.layers.experts import ExpertsConfig, check_experts, pack_experts
from qlora_lightning.model.layers.select import Fusion, fuse_layers
from qlora_lightning.model.load.base_model import Quantization, check_widths, keep_quantized_layers, load_base
from qlora_lightning.model.load.machine import advise_allocator, explain_dtype
from qlora_lightning.model.load.wrapped import empty_model, open_text_config
from qlora_lightning.model.model_types import LINEARS, causal_lm_of, layer_of, linear_sizes, runs_packed
from qlora_lightning.sources.folders import find_adapter_folder, open_base, read_config, read_identity
from qlora_lightning.support.console import count_of
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import say_once


def assemble_model(
    adapter: str | None, adapter_options: dict[str, Any], fast: bool, **base_options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a base with ``load_base``, and complete it.

    Returns:
        The model, whose layers run fused if ``fast``, and the identity of base and adapter.
    """
    if adapter is not None:
        read_identity(find_adapter_folder(adapter))  # rejects a wrong name before loading
    with torch.random.fork_rng(devices=[]):  # some types draw random weights first, unless the base is in the cache
        loaded = load_base(**base_options)
    identity = {**loaded.identity}
    return complete_model(loaded.model, identity, adapter, adapter_options, fast), identity


def complete_model(
    model: Any, identity: dict[str, Any], adapter: str | None, adapter_options: dict[str, Any], fast: bool
) -> peft.PeftModel:
    """Complete a base, or the transformers or PEFT model that an override of ``build_model`` returned.

    The model gets adapters if it has none, and the values from the folder ``adapter``. ``identity`` gets its missing
    entries: those of the adapters, and those of ``load_base`` or else a hash of the frozen weights and their dtype.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"build_model returned {type(model).__name__}: expected a transformers model, or a PEFT model around one. "
            "`load_base` returns one as `.model`.",
            "model.build",
        )
    folder = None if adapter is None else find_adapter_folder(adapter)
    stored_identity = {} if folder is None else read_identity(folder)
    keep_quantized_layers(model)
    check_widths(model)
    base: Any = causal_lm_of(model)
    if "fingerprint" not in identity:
        identity.update(getattr(base, "loaded_identity", {}))
    check_identity(stored_identity, identity, f"The adapter folder {folder}")
    if not isinstance(model, peft.PeftModel):
        model = put_adapters(base.requires_grad_(False), folder, **adapter_options)
        model.peft_config[ADAPTER].revision = identity.get("revision")  # PEFT finds the base by it
        identity["adapter"] = describe_adapter(model)
        fuse_layers(model, fast)
    elif folder is not None:
        fill_adapter(model, folder)
    if "fingerprint" not in identity:
        identity |= {"compute_dtype": str(base.dtype).removeprefix("torch."), "fingerprint": hash_weights(base)}
        identity["own_base"] = True  # only the same class can make it again
        check_identity(stored_identity, identity, f"The adapter folder {folder}")
    return model


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a base's tensors and their names, including the scales of quantized ones."""
    trainable, digest = trainable_tensors(model), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name not in trainable and ADAPTER not in name.split(".") and isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def put_adapters(base: PreTrainedModel, folder: Path | None = None, **options: Any) -> peft.PeftModel:
    """Put a folder's adapter on a base, with its own rank, alpha and targets, or a new adapter with ``options``.

    If the base is on the meta device, so is a new adapter. A folder's adapter has its values even then.
    """
    if folder is None:
        return inject(base, new_lora_config(base, **options))
    model = inject(base, read_lora_config(folder, base.config), str(folder))
    fill_adapter(model, folder)
    return model


def settings_of_adapter(module: Any) -> dict[str, Any]:
    """Return the module's ``adapter_options``, completed from the folder in its ``adapter``.

    This reads no weights, so settings that contradict the folder are rejected before a base is loaded.
    """
    folder, base = find_adapter_folder(str(module.adapter)), None
    read_identity(folder)
    if not module.overrides("build_model"):
        source = open_base(module.base, module.revision, weights=False)
        # a base with its own code may not work on the meta device
        if not (module.trust_remote_code and "auto_map" in read_config(source.folder, source.name)):
            base = meta_base(open_text_config(source.folder, module.base))
    return settings_of_folder(folder, base, module.adapter_options)


class ModelReport(Callback):
    """Print a summary of the model at the start of a fit; the module adds this in ``configure_callbacks``."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        report_model(module, module.choose_layers())


def report_model(module: Any, fusion: Fusion) -> None:
    """Print facts about the device, the trainable tensors, and why layers do not run fused."""
    layers = [(name, layer) for name, layer in module.model.named_modules() if isinstance(layer, LoraLayer)]
    names = [getattr(layer, "parameter_name", name.rpartition(".")[2]) for name, layer in layers]
    trainable, total = count_parameters(module)
    extra = own_tensors(module)
    rank = getattr(module.model.peft_config.get(ADAPTER), "r", None)  # an override of build_model may have no LoRA
    reasons, config = [reason for reason in fusion.layers.values() if reason is not None], module.causal_lm.config
    if module.precision.autocasts_layers and not reasons:  # under autocast no layer runs fused
        reasons = ["model.lora_options train more than plain LoRA"] * len(fusion.layers)
    for line in (
        explain_dtype(module.device, module.identity.get("compute_dtype", "float32")),
        advise_allocator(module.device),
        f"Of a {config.wrapper}, only the text model is trained, without images and the like."
        if hasattr(config, "wrapper")
        else None,
        f"Adapter{'' if rank is None else f' of rank {rank}'} on {count_of(len(names), 'module')} "
        f"({', '.join(dict.fromkeys(names))}): {trainable:,} of {total:,} parameters train ({trainable / total:.2%}).",
        f"In addition to the adapter, the adapter folder stores {', '.join(extra)}, in extra.safetensors."
        if extra
        else None,
        f"{', '.join(frozen)}, frozen outside the model, is saved in no checkpoint and no adapter folder: your class "
        "creates it again, for example in `__init__`."
        if (frozen := frozen_models(module))
        else None,
        f"Learning rate: {module.learning_rate:.1e} at its peak (model.learning_rate: auto)."
        if module.hparams.get("learning_rate") == "auto" and not module.overrides("configure_optimizers")
        else None,
        f"{len(reasons)} of {len(fusion.layers)} layers train with the slower layers of PEFT and transformers: "
        f"{'; '.join(dict.fromkeys(reasons))}."
        if reasons and module.fast
        else None,
        None if runs_packed(config) else f"A {config.model_type} runs one row at a time in transformers' own forward.",
    ):
        if line is not None:
            say_once(line)


# ---- shapes without numbers ------------------------------------------------------------------------------------------


def meta_base(config: Any, dtype: torch.dtype = torch.float32, quantization: Quantization = "none") -> PreTrainedModel:
    """Build a frozen base on the meta device; this removes ``quantization_config`` from ``config``."""
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    model = empty_model(config, dtype)
    if quantization != "none":
        check_experts(model, quantization, config.name_or_path or config.model_type)
        with torch.device("meta"):
            for name, linear in list(model.named_modules()):
                if isinstance(linear, LINEARS) and layer_of(name) is not None:
                    model.set_submodule(name, _quantized_linear(linear, quantization, dtype))
            pack_experts(model, ExpertsConfig(bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype))
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization != "int8"
    model.requires_grad_(False)
    return model


def _quantized_linear(linear: Any, quantization: Quantization, dtype: torch.dtype) -> Any:
    """Build a bitsandbytes linear whose weight has the form in which transformers loads it."""
    weight, sizes = linear.weight.detach(), (*linear_sizes(linear), linear.bias is not None)
    weight = weight.t() if isinstance(linear, Conv1D) else weight  # (out, in)
    quantized: Any
    if quantization == "int8":
        quantized = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        quantized.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    else:
        quantized = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type=quantization)
        packed, quant_state = bnb.functional.quantize_4bit(weight, quant_type=quantization)
        quantized.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=quant_state, quant_type=quantization, bnb_quantized=True
        )
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.detach())
    return quantized
