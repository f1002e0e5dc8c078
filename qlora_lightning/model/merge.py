"""An adapter merged into its base, one tensor in memory at a time."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bitsandbytes as bnb
import peft
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

Weights = Callable[[str], Tensor]  # a base's tensor by its name


# ---- a base's weights ------------------------------------------------------------------------------------------------


class TrainedWeights:
    """Weights as an adapter saw them in training: quantized ones dequantized to fp32, others in the compute dtype.

    They are bit for bit those of the quantized base in the cache, which is made if it is missing, or of a base that is
    stored quantized. ``transposed`` names the weights that quantized linears hold transposed; ``stored_names`` are the
    names in the base's files.
    """

    def __init__(
        self,
        base: BaseFolder,
        quantization: Quantization,
        double_quant: bool,
        compute_dtype: torch.dtype,
        transposed: Collection[str] = (),
        stored_names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        is_stored = "quantization_config" in read_config(base.folder, base.name)
        is_cached = quantization != "none" and not is_stored
        folder = quantized_folder(base, quantization, double_quant, compute_dtype) if is_cached else base.folder
        self.files, self.compute_dtype, self._transposed = TensorFiles(folder, base.name), compute_dtype, transposed
        self._stored_names = stored_names

    def __call__(self, name: str) -> Tensor:
        """Return a tensor: fp32 if it was quantized, else in the compute dtype."""
        module_name, _, weight_name = name.rpartition(".")
        experts_name = f"{module_name}.{packed_name(weight_name)}.weight"
        known_names = (name, self._stored_names.get(name, name), experts_name)
        stored_name = next((key for key in known_names if key in self.files), None)
        if stored_name is None:
            raise UserError(
                f"The base's files have no {name}, as of mixtures of experts: serve the adapter beside it.",
                "base.tensors",
            )
        name, tensor = stored_name, self.files.read(stored_name)
        if tensor.dtype == torch.uint8:
            keys = [key for key in self.files if key.startswith(f"{name}.")]
            quant_tensors = {key.removeprefix(f"{name}."): self.files.read(key) for key in keys}
            quant_state = bnb.functional.QuantState.from_dict(quant_tensors, torch.device("cpu"))
            quant_state.dtype = torch.float32  # of the result: no extra rounding to the compute dtype
            weight = dequantize(tensor, quant_state)
        elif tensor.dtype == torch.int8:  # absmax by rows (Dettmers et al. 2022): 127 steps on each side of zero
            scales = self.files.read(name.removesuffix("weight") + "SCB")
            weight = tensor.float() * (scales.float().unsqueeze(1) / 127)
        else:
            return tensor.to(self.compute_dtype)
        return weight.t() if name in self._transposed else weight


# ---- merged ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergePlan:
    """A base on the meta device with a real adapter, and the shapes of the merged model's tensors, tied ones once.

    Attributes:
        model: The base with the adapter.
        shapes: By the names in the model.
        config: The base's, without quantization.
        transposed: Names of the weights of GPT-2's Conv1D.
        has_parts: Whether experts are written as they are published, each by itself.
        stored_names: Names of the base's tensors in its files, by those in the model.
        copied: Tensors in the files that are no weights of the text model.
    """

    model: peft.PeftModel
    shapes: dict[str, tuple[int, ...]]
    config: Any
    transposed: set[str]
    has_parts: bool
    stored_names: dict[str, str]
    copied: dict[str, tuple[int, ...]]

    def publish(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return a tensor of the merged model by the names, and in the parts, that are written."""
        causal_lm = self.model.get_base_model()
        parts = dict(revert_weight_conversion(causal_lm, {name: tensor})) if self.has_parts else {name: tensor}
        in_wrapper = getattr(self.config, "names_in_wrapper", {})
        return {self.stored_names.get(part) or rename(part, in_wrapper): value for part, value in parts.items()}


def plan_merge(base_folder: Path, adapter: Path) -> MergePlan:
    """Put an adapter on its base on the meta device."""
    config = open_text_config(base_folder, str(base_folder))
    if hasattr(config, "wrapper") and getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{base_folder} is stored quantized, with parts for images that cannot be copied into a model in 16 bits. "
            "Serve the adapter beside it, or name the base in 16 bits by --base.",
            "merge.quantized_wrapper",
        )
    base = meta_base(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    buffers = {name for name, _ in base.named_buffers()}
    stored = TensorFiles(base_folder, str(base_folder)).shapes()
    names = names_in_text(base_folder, config, stored)
    stored_names = {name: key for key, name in names.items()}
    has_parts = bool(experts_of(base)) and not shapes.keys() <= stored_names.keys()
    transposed = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, Conv1D)}
    model = put_adapters(base, adapter).requires_grad_(False).eval()
    # what is no text, and buffers of the text, such as a bias that chooses experts
    copied = {key: shape for key, shape in stored.items() if key not in names or names[key] in buffers}
    return MergePlan(model, shapes, config, transposed, has_parts, stored_names, copied)


class MergedWeights:
    """Weights of the base with an adapter merged, by name.

    PEFT's own layers merge, on weights in fp32; a tensor that the adapter does not change is that of ``weights``.
    """

    def __init__(self, plan: MergePlan, weights: Weights) -> None:
        self._weights, causal_lm = weights, plan.model.get_base_model()
        changed: list[tuple[str, Any]] = [  # tensors of modules_to_save, which train whole
            item for item in causal_lm.named_parameters() if f".modules_to_save.{ADAPTER}." in item[0]
        ]
        for name, module in causal_lm.named_modules():
            if isinstance(module, (LoraLayer, TrainableTokensLayer)) and not getattr(module, "tied_adapter", None):
                changed.append((f"{name}.{_weight_name(module)}", module))
        names_in_model = {*plan.shapes, *causal_lm.all_tied_weights_keys}
        self._changed = dict[str, Any]()  # trained tensors, and layers of the adapter, by the tensor that they change
        for name, change in changed:
            name = re.sub(rf"\.(base_layer|original_module|token_adapter|modules_to_save\.{ADAPTER})", "", name)
            if name in self._changed or name not in names_in_model:
                raise UserError(
                    f"The adapter trains {name} twice, or the base has no such tensor: it cannot be merged. Serve it "
                    "beside its base.",
                    "merge.unused",
                )
            self._changed[name] = change

    def __call__(self, name: str) -> Tensor:
        """Return a tensor of the merged model; PEFT raises a ValueError if it is not finite."""
        module = self._changed.get(name)
        if isinstance(module, Tensor):  # trained whole
            return module.detach().float()
        if module is None:  # adapters do not change biases
            return self._weights(name)
        base_layer, weight_name = module.get_base_layer(), _weight_name(module)
        meta_weight = getattr(base_layer, weight_name)
        setattr(base_layer, weight_name, nn.Parameter(self._weights(name).float(), requires_grad=False))
        module.merge(safe_merge=True, adapter_names=[ADAPTER])
        merged: Tensor = getattr(base_layer, weight_name).detach()
        setattr(base_layer, weight_name, meta_weight)
        module.merged_adapters.clear()
        return merged


def _weight_name(module: Any) -> str:
    return getattr(module, "parameter_name", "weight")
