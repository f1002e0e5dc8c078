"""An adapter merged into its base, one tensor in memory at a time."""

import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from qlora_lightning.model.adapters.inject import ADAPTER
from qlora_lightning.model.layers.experts import experts_of, packed_name
from qlora_lightning.model.layers.lora import dequantize
from qlora_lightning.model.load.base_model import Quantization, quantized_folder
from qlora_lightning.model.load.build import meta_base, put_adapters
from qlora_lightning.model.load.wrapped import names_in_text, open_text_config, rename
from qlora_lightning.sources.folders import BaseFolder, TensorFiles, read_config
from qlora_lightning.support.errors import UserError


class TrainedWeights:
    """Weights as an adapter saw them in training: quantized ones dequantized to fp32, others in the compute dtype.

    They are bit for bit those of the quantized base in the cache, which is made if it is missing, or of a base that is
    stored quantized.
    """

    def __init__(
        self, base: BaseFolder, plan: "Merge", quantization: Quantization, double_quant: bool, dtype: torch.dtype
    ) -> None:
        is_stored = "quantization_config" in read_config(base.folder, base.name)
        is_cached = quantization != "none" and not is_stored
        folder = quantized_folder(base, quantization, double_quant, dtype) if is_cached else base.folder
        self._files, self._plan, self._dtype = TensorFiles(folder), plan, dtype

    def __call__(self, name: str) -> Tensor:
        """Return a tensor by its name in the model: fp32 if it was quantized, else in the compute dtype."""
        module_name, _, weight_name = name.rpartition(".")
        experts_name = f"{module_name}.{packed_name(weight_name)}.weight"
        known_names = (name, self._plan.stored_names.get(name, name), experts_name)
        stored_name = next((key for key in known_names if key in self._files), None)
        if stored_name is None:
            raise UserError(
                f"The base's files have no {name}, as of mixtures of experts: serve the adapter beside it.",
                "base.tensors",
            )
        tensor = self._files.read(stored_name)  # fp32 if it is stored in FP8, and rounded below as it is when loaded
        if tensor.dtype == torch.uint8:
            keys = [key for key in self._files if key.startswith(f"{stored_name}.")]
            quant_tensors = {key.removeprefix(f"{stored_name}."): self._files.read(key) for key in keys}
            quant_state = bnb.functional.QuantState.from_dict(quant_tensors, torch.device("cpu"))
            quant_state.dtype = torch.float32  # of the result: no extra rounding to the compute dtype
            weight = dequantize(tensor, quant_state)
        elif tensor.dtype == torch.int8:  # absmax by rows (Dettmers et al. 2022): 127 steps on each side of zero
            scales = self._files.read(stored_name.removesuffix("weight") + "SCB")
            weight = tensor.float() * (scales.float().unsqueeze(1) / 127)
        else:
            return tensor.to(self._dtype)
        return weight.t() if name in self._plan.transposed else weight


class Merge:
    """An adapter on its base, which is on the meta device: merges the base's tensors one by one, by PEFT's own layers.

    Attributes:
        config: The base's, without quantization.
        shapes: Of the merged model's tensors, tied ones once, by their names in the model.
        stored_names: Names of the base's tensors in its files, by those in the model.
        transposed: Names of the weights of GPT-2's Conv1D, which quantized linears hold transposed.
        copied: Shapes of tensors in the files that are no weights of the text model.
    """

    def __init__(self, base_folder: Path, adapter: Path) -> None:
        self.config = open_text_config(base_folder, str(base_folder))
        if hasattr(self.config, "wrapper") and getattr(self.config, "quantization_config", None) is not None:
            raise UserError(
                f"{base_folder} is stored quantized, with parts for images that cannot be copied into a model in 16 "
                "bits. Serve the adapter beside it, or name the base in 16 bits by --base.",
                "merge.quantized_wrapper",
            )
        base = meta_base(self.config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
        buffers = {name for name, _ in base.named_buffers()}
        stored = TensorFiles(base_folder).shapes()
        names = names_in_text(base_folder, self.config, stored)
        self.stored_names = {name: key for key, name in names.items()}
        self.transposed = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Conv1D)}
        # what is no text, and buffers of the text, such as a bias that chooses experts
        self.copied = {key: shape for key, shape in stored.items() if key not in names or names[key] in buffers}
        # experts are written as they are published, each by itself
        self._has_parts = bool(experts_of(base)) and not self.shapes.keys() <= self.stored_names.keys()
        model = put_adapters(base, adapter).requires_grad_(False).eval()
        self._causal_lm = model.get_base_model()
        self._changed = self._find_changed()

    def _find_changed(self) -> dict[str, Any]:
        """Return layers of the adapter, and tensors that it trains whole, by the tensor that they change."""
        changes = [item for item in self._causal_lm.named_parameters() if f".modules_to_save.{ADAPTER}." in item[0]]
        for name, module in self._causal_lm.named_modules():
            if isinstance(module, (LoraLayer, TrainableTokensLayer)) and not getattr(module, "tied_adapter", None):
                changes.append((f"{name}.{_weight_name(module)}", module))
        names_in_model, changed = {*self.shapes, *self._causal_lm.all_tied_weights_keys}, dict[str, Any]()
        for name, change in changes:
            name = re.sub(rf"\.(base_layer|original_module|token_adapter|modules_to_save\.{ADAPTER})", "", name)
            if name in changed or name not in names_in_model:
                raise UserError(
                    f"The adapter trains {name} twice, or the base has no such tensor: it cannot be merged. Serve it "
                    "beside its base.",
                    "merge.unused",
                )
            changed[name] = change
        return changed

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Return a tensor of the merged model for one of the base; PEFT raises a ValueError if it is not finite."""
        change = self._changed.get(name)
        if change is None:
            return weight
        if isinstance(change, Tensor):  # trained whole
            return change.detach().float()
        base_layer, weight_name = change.get_base_layer(), _weight_name(change)
        meta_weight = getattr(base_layer, weight_name)
        setattr(base_layer, weight_name, nn.Parameter(weight.float(), requires_grad=False))
        change.merge(safe_merge=True, adapter_names=[ADAPTER])
        merged: Tensor = getattr(base_layer, weight_name).detach()
        setattr(base_layer, weight_name, meta_weight)
        change.merged_adapters.clear()
        return merged

    def publish(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return a tensor of the merged model by the names, and in the parts, that are written."""
        parts = dict(revert_weight_conversion(self._causal_lm, {name: tensor})) if self._has_parts else {name: tensor}
        in_wrapper = getattr(self.config, "names_in_wrapper", {})
        return {self.stored_names.get(part) or rename(part, in_wrapper): value for part, value in parts.items()}


def _weight_name(module: Any) -> str:
    return getattr(module, "parameter_name", "weight")
