"""The tensors of a transformers folder, read one at a time, so that the whole model is never in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lightning.base.model_folder import weight_files
from qlora_lightning.base.safetensors_header import TensorSpan, read_spans
from qlora_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class TensorFiles:
    """Reads tensors by name. They are read, not mapped: mapped pages of 16 GB would all count as resident.

    Args:
        folder: with ``model.safetensors``, or shards and their index.
        name: what the user wrote, for messages.

    Raises:
        UserError: the folder holds no whole safetensors weights.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._spans = {span.name: span for file in weight_files(folder, name) for span in read_spans(file)}

    def __contains__(self, name: object) -> bool:
        return name in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._span(name).shape

    def read(self, name: str) -> "Tensor":
        """Read one tensor, in the dtype in which it is stored.

        Raises:
            UserError: there is no such tensor, its dtype is unknown, or its file has become shorter.
        """
        import torch

        span = self._span(name)
        if span.dtype not in _DTYPES:
            raise UserError(f"Base {self.name}: {name} is stored as {span.dtype}, which is not supported.")
        dtype: torch.dtype = getattr(torch, _DTYPES[span.dtype])
        tensor = torch.empty(span.shape, dtype=dtype)
        with span.file.open("rb", buffering=0) as stream:
            stream.seek(span.start)
            content: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
            view = memoryview(content)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise UserError(f"{span.file} became shorter while it was read. Download or save it again.")
                view = view[count:]
        return tensor

    def _span(self, name: str) -> TensorSpan:
        if name not in self._spans:
            raise UserError(
                f"Base {self.name}: expected the tensor {name} in {self.folder}, found none of that name. "
                "Save the model again with transformers' save_pretrained."
            )
        return self._spans[name]
