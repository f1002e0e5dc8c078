"""A base's weights, one tensor at a time."""

import contextlib
import re
from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_lightning.base.folder import BaseFolder, TensorFiles
from qlora_lightning.model.load.base_model import Quantization, find_quantized

Weights = Callable[[str], Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class OriginalWeights:
    """Weights as they are stored, by name."""

    def __init__(self, base: BaseFolder) -> None:
        self.files = TensorFiles(base.folder, base.name)

    def __call__(self, name: str) -> Tensor:
        """Return a tensor in the dtype in which it is stored."""
        return _read(self.files, name)


class TrainedWeights:
    """Weights as an adapter saw them in training: quantized and back, in fp32; all others in the compute dtype.

    If the cache holds the quantized base, or the base is stored quantized, they are what is stored there, bit for bit,
    whichever device quantized it. Else they are quantized again, tensor by tensor, by what quantizes at loading: so no
    whole quantized base is needed, in memory or on the disk.
    """

    def __init__(
        self, base: BaseFolder, quantization: Quantization, double_quant: bool, compute_dtype: torch.dtype
    ) -> None:
        packed = find_quantized(base, quantization, double_quant, compute_dtype)
        self.files = TensorFiles(packed or base.folder, base.name)
        self.quantization, self.double_quant, self.compute_dtype = quantization, double_quant, compute_dtype

    def __call__(self, name: str) -> Tensor:
        """Return a tensor: fp32 if it was quantized, else in the compute dtype."""
        stored = _read(self.files, name)
        if stored.dtype == torch.uint8:
            parts = [each for each in self.files if each.startswith(f"{name}.")]
            state = {part.removeprefix(f"{name}."): self.files.read(part) for part in parts}
            return _dequantize_4bit(stored, bnb.functional.QuantState.from_dict(state, torch.device("cpu")))
        if stored.dtype == torch.int8:
            return _dequantize_int8(stored, self.files.read(name.removesuffix("weight") + "SCB"))
        weight = stored.to(self.compute_dtype)
        if ".layers." not in name or weight.dim() < 2:
            return weight
        if self.quantization == "none":
            return weight.float()
        if self.quantization == "int8":
            held = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
            return _dequantize_int8(held.CB, held.SCB)
        options = {"quant_type": self.quantization, "compress_statistics": self.double_quant}
        held = bnb.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")
        return _dequantize_4bit(held.data, held.quant_state)


def _read(files: TensorFiles, name: str) -> Tensor:
    """Read a tensor; the head of a base with tied embeddings is under the embedding's name."""
    return files.read(EMBEDDING if name == HEAD and name not in files else name)


def _dequantize_4bit(packed: Tensor, state: bnb.functional.QuantState) -> Tensor:
    state.dtype = torch.float32  # of what comes out: no rounding to the compute dtype on top
    weight: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return weight


def _dequantize_int8(rows: Tensor, scales: Tensor) -> Tensor:
    """Undo LLM.int8()'s absmax quantization by rows (Dettmers et al. 2022): 127 steps on each side of zero."""
    return rows.float() * (scales.float().unsqueeze(1) / 127)


def name_in_base(name: str) -> str:
    """Return the name that a tensor of the base has without what PEFT puts between a module and its weights."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)", "", name)


@contextlib.contextmanager
def holding_weights(
    module: nn.Module, prefix: str, weights: Weights, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Hold the weights of a hollow module, whose name in the base is ``prefix``, in memory for a while."""
    empty: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, owner in module.named_modules(prefix=prefix):
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                empty.append((owner, name, parameter))
                value = weights(name_in_base(f"{path}.{name}"))
                owner.register_parameter(name, nn.Parameter(value.to(dtype or value.dtype), requires_grad=False))
    try:
        yield
    finally:
        for owner, name, parameter in empty:
            owner.register_parameter(name, parameter)
