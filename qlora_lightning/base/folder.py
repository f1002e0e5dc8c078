"""Any base as an ordinary transformers folder, checked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lightning.base.tensors import TensorSpan, read_spans
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import read_json_object

if TYPE_CHECKING:
    from torch import Tensor
from dataclasses import dataclass
from typing import Literal

from qlora_lightning.base.find import resolve_base
from qlora_lightning.base.gguf import unpack_gguf

# What a config can ask for, and our attention and transformers' LLaMA would pass over in silence.
_UNSUPPORTED = {
    "sliding_window": "a sliding attention window",
    "attention_chunk_size": "chunked attention",
    "attn_logit_softcapping": "soft caps on attention scores",
    "final_logit_softcapping": "soft caps on logits",
    "attention_sinks": "attention sinks",
    "attention_sink_size": "attention sinks",
    "num_attention_sinks": "attention sinks",
}


def check_model_folder(folder: Path, name: str, *, weights: bool = True) -> None:
    """Check that ``folder`` holds a LLaMA that this package trains as it is.

    Args:
        folder: with ``config.json`` and, where ``weights``, safetensors files.
        name: what the user wrote, for messages.
        weights: False looks at the config alone.

    Raises:
        UserError: something is missing, damaged, or of another kind.
    """
    config = read_config(folder, name)
    model_type = config.get("model_type")
    if model_type != "llama":
        raise UserError(
            f"Base {name}: expected model_type llama in {folder / 'config.json'}, found {model_type!r}. "
            "Choose a LLaMA-family base (Llama 2, 3, SmolLM, TinyLlama, Yi, …)."
        )
    _check_features(config, name)
    if weights:
        _check_weights(folder, name)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the folder's ``config.json``.

    Raises:
        UserError: it is missing or not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It is an adapter folder: give it as model.adapter, and its base as model.base."
        raise UserError(f"Base {name}: expected a transformers folder, found no config.json in {folder}.{hint}")
    try:
        return read_json_object(file, "Download or save the base again.")
    except UserError as error:
        raise UserError(f"Base {name}: {error}") from error


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files that transformers loads from ``folder``, all of which exist.

    Raises:
        UserError: there are none, or the index names some that are missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(_no_weights(folder, name))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"Base {name}: {index} is not an index of shards ({error!r}). Download or save the base again."
        ) from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        found = f"{len(missing)} of {len(shards)} shards are missing" + (f" ({missing[0]}, …)" if missing else "")
        raise UserError(f"Base {name}: {found}, which {index} names. Finish the download, or copy the missing files.")
    return [folder / shard for shard in shards]


def _check_features(config: dict[str, Any], name: str) -> None:
    for key, meaning in _UNSUPPORTED.items():
        off = key == "sliding_window" and config.get("use_sliding_window") is False
        if config.get(key) and not off:
            raise UserError(
                f"Base {name}: its config.json sets {key}: {config[key]} ({meaning}), which qlora_lightning does not "
                "compute and will not ignore. Choose a base without it."
            )
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        raise UserError(
            f"Base {name}: its config.json has layer_types {', '.join(sorted(layer_types))}; expected full_attention "
            "alone. Choose a base without them."
        )


def _check_weights(folder: Path, name: str) -> None:
    for file in weight_files(folder, name):
        sinks = [span.name for span in read_spans(file) if span.name.endswith(".sinks")]
        if sinks:
            raise UserError(
                f"Base {name}: {file.name} holds attention sinks ({sinks[0]}, …), which qlora_lightning does not "
                "compute and will not ignore. Choose a base without them."
            )


def _no_weights(folder: Path, name: str) -> str:
    expected = f"Base {name}: expected model.safetensors or model.safetensors.index.json in {folder}"
    pickles = sorted(file.name for file in folder.glob("*.bin") if file.name.startswith("pytorch_model"))
    if pickles:
        return (
            f"{expected}, found only {pickles[0]}, a pickle, which can run code when it is opened and is refused. "
            "Convert it once, where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)."
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = ", ".join(others) or "no *.safetensors file"
    return f"{expected}, found {found}. Give the folder of a whole model."


_TOKENS = {"eos_token_id": (int, [int]), "bos_token_id": (int, [int]), "pad_token_id": int}


def read_generation_config(file: Path) -> dict[str, Any]:
    """Read a ``generation_config.json``, or the same keys of a ``config.json``.

    Raises:
        UserError: It is not a JSON object, or the tokens in it are none.
    """
    return read_json_object(file, "The stop tokens stand there: mend or delete it.", _TOKENS)


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


@dataclass(frozen=True)
class BaseFolder:
    """A checked transformers folder: ``folder`` to load from, ``name`` as the user wrote it, ``kind`` as it came.

    ``revision`` is the commit of a hub snapshot, else None.
    """

    name: str
    folder: Path
    kind: Literal["hub", "folder", "gguf"]
    revision: str | None


def open_base(name: str, revision: str | None = None, *, weights: bool = True) -> BaseFolder:
    """Find a base, unpack it where it is a GGUF, and check what is there.

    Args:
        name: a hub id, a folder, a ``.gguf`` file, or ``package:NAME``.
        revision: branch, tag or commit of a hub id.
        weights: False is enough for config and tokenizer: it neither downloads nor checks the weights.

    Raises:
        UserError: there is no such base, or not one that can be trained here.
    """
    source = resolve_base(name, revision, weights=weights)
    folder = unpack_gguf(source) if source.kind == "gguf" else source.path
    check_model_folder(folder, name, weights=weights)
    return BaseFolder(name, folder, source.kind, source.revision)
