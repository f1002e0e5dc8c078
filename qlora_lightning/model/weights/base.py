"""A base's weights one at a time, and a model without them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_lightning.base.folder import BaseFolder, TensorFiles
from qlora_lightning.model.adapters.folder import open_adapter_folder
from qlora_lightning.model.base_model import Quantization
from qlora_lightning.model.layers.attention import register_flat_attention

Weights = Callable[[str], Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def quantized_names(skeleton: PreTrainedModel) -> frozenset[str]:
    """Name the weights that are quantized: those of the decoder layers' linears."""
    linears = (name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear))
    return frozenset(f"{name}.weight" for name in linears if ".layers." in name)


class OriginalWeights:
    """Weights as they are stored. Called with a name, it gives the tensor.

    Args:
        base: Where they lie.
    """

    def __init__(self, base: BaseFolder) -> None:
        self.files = TensorFiles(base.folder, base.name)

    def __call__(self, name: str) -> Tensor:
        """Give a tensor in the dtype in which it is stored."""
        return self.files.read(_stored_name(self.files, name))


class TrainedWeights:
    """Weights as an adapter saw them in training: quantized and back, in fp32; all others in the compute dtype.

    Quantized anew, tensor by tensor, by what quantizes at loading: so no whole quantized base is needed, in memory or
    on the disk. A base that is stored quantized gives what it stores.

    Args:
        base: Where the weights lie.
        quantized: Names of the weights that are quantized; see :func:`quantized_names`.
        quantization: How.
        double_quant: Whether the 4-bit scales are quantized too.
        compute_dtype: Dtype in which the base was loaded, and so quantized from.
    """

    def __init__(
        self,
        base: BaseFolder,
        quantized: frozenset[str],
        quantization: Quantization,
        double_quant: bool,
        compute_dtype: torch.dtype,
    ) -> None:
        self.files = TensorFiles(base.folder, base.name)
        self.quantized = quantized
        self.quantization, self.double_quant, self.compute_dtype = quantization, double_quant, compute_dtype

    def __call__(self, name: str) -> Tensor:
        """Give a tensor: fp32 where it was quantized, else in the compute dtype."""
        stored = self.files.read(_stored_name(self.files, name))
        if name not in self.quantized:
            return stored.to(self.compute_dtype)
        if stored.dtype == torch.uint8:
            return _dequantize_4bit(stored, bnb.functional.QuantState.from_dict(self._state(name), torch.device("cpu")))
        if stored.dtype == torch.int8:
            return _dequantize_int8(stored, self.files.read(name.removesuffix("weight") + "SCB"))
        weight = stored.to(self.compute_dtype)
        if self.quantization == "none":
            return weight.float()
        if self.quantization == "int8":
            held = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
            return _dequantize_int8(held.CB, held.SCB)
        options = {"quant_type": self.quantization, "compress_statistics": self.double_quant}
        held = bnb.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")
        return _dequantize_4bit(held.data, held.quant_state)

    def _state(self, name: str) -> dict[str, Any]:
        parts = [each for each in self.files if each.startswith(f"{name}.")]
        return {part.removeprefix(f"{name}."): self.files.read(part) for part in parts}


def _stored_name(files: TensorFiles, name: str) -> str:
    """Find the head of a base with tied embeddings under the embedding's name."""
    return EMBEDDING if name == HEAD and name not in files else name


def _dequantize_4bit(packed: Tensor, state: Any) -> Tensor:
    state.dtype = torch.float32  # of what comes out: no rounding to the compute dtype on top
    weight: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return weight


def _dequantize_int8(rows: Tensor, scales: Tensor) -> Tensor:
    """Undo LLM.int8()'s absmax quantization by rows (Dettmers et al. 2022): 127 steps on each side of zero."""
    return rows.float() * (scales.float().unsqueeze(1) / 127)


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
