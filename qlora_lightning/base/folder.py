"""Any base as an ordinary transformers folder, checked: config, tokenizer, fingerprint, and tensors one at a time."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_lightning.base.cache import Json, cache_root, hash_key, make_root
from qlora_lightning.base.find import resolve_base
from qlora_lightning.base.gguf import unpack_gguf
from qlora_lightning.base.tensors import TensorSpan, read_spans
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import read_json_object, write_whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

# Types that are trained. Each gives the losses of plain transformers: tests/model/test_families.py.
MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite"),
    *("smollm3", "glm4", "exaone4", "ernie4_5", "seed_oss"),
)
# What a LLaMA's config can ask for, and transformers' LLaMA ignores without a word.
_IGNORED = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping")

_FINGERPRINT_FORMAT = 1  # raised whenever the same tensors would give another fingerprint
_CHUNK_BYTES = 4 << 20
_THREADS = 4  # hashlib lets go of the interpreter's lock; more threads than disks feed gain nothing


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
    """Find a base, unpack it if it is a GGUF, and check what is there, its weights only if they are wanted."""
    path, commit = resolve_base(name, revision, weights=weights)
    is_gguf = path.is_file()
    folder = unpack_gguf(path, name) if is_gguf else path
    check_model_folder(folder, name, weights=weights)
    return BaseFolder(name, folder, "gguf" if is_gguf else "folder" if commit is None else "hub", commit)


def check_model_folder(folder: Path, name: str, *, weights: bool = True) -> None:
    """Check that a folder holds a model that this package trains as it is; ``name`` is what the user wrote."""
    config = read_config(folder, name)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        problem = f"Base {name}: its model_type is {model_type!r} ({folder / 'config.json'})"
        if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")):
            raise UserError(
                f"{problem}, a mixture of experts. bitsandbytes quantizes linears, and its experts would stay in 16 "
                "bits. Choose a dense base."
            )
        raise UserError(f"{problem}: expected one of {', '.join(MODEL_TYPES)}. Choose a base of these.")
    unsupported = _unsupported_settings(config)
    if unsupported:
        key, value = next(iter(unsupported.items()))
        raise UserError(
            f"Base {name}: its config.json sets {key}: {value}, which qlora_lightning does not compute and will not "
            "ignore. Choose a base without it."
        )
    if weights:
        for file in weight_files(folder, name):
            read_spans(file)


def _unsupported_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config sets that is computed neither by us nor by transformers."""
    is_llama = config["model_type"] == "llama"
    unsupported = {key: config[key] for key in _IGNORED if is_llama and config.get(key)}
    if config.get("use_sliding_window") is False:
        unsupported.pop("sliding_window", None)
    supported_types = {"full_attention"} if is_llama else {"full_attention", "sliding_attention"}
    other_types = set(config.get("layer_types") or ()) - supported_types
    if other_types:
        unsupported["layer_types"] = sorted(other_types)
    if config.get("use_bidirectional_attention"):  # Gemma 3's, of models that embed texts
        unsupported["use_bidirectional_attention"] = True
    return unsupported


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the folder's ``config.json``."""
    file = folder / "config.json"
    if not file.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It is an adapter folder: give it as model.adapter, and its base as model.base."
        raise UserError(f"Base {name}: expected a transformers folder, found no config.json in {folder}.{hint}")
    return read_json_object(file, "Download or save the base again.")


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files that transformers loads from ``folder``, all of which exist."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))) or "no *.safetensors file"
        remedy = "Give the folder of a whole model."
        if any(folder.glob("pytorch_model*.bin")):
            remedy = (
                "Its pytorch_model*.bin is a pickle, which can run code when it is opened and is refused. Convert it "
                "once, where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)."
            )
        raise UserError(f"Base {name}: expected {single.name} or {index.name} in {folder}, found {others}. {remedy}")
    remedy = "Download or save the base again."
    weight_map = read_json_object(index, remedy).get("weight_map")
    shards: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"Base {name}: weight_map in {index} must name files beside it, found {shard!r}. {remedy}")
    files = [folder / shard for shard in sorted(set(shards))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"Base {name}: {missing[0]} is missing, which {index} names. {remedy}")
    return files


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of what ``base`` takes; a folder with nothing else (an adapter folder) works too."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if revision is not None or not folder.is_dir():
        folder = open_base(name, revision, weights=False).folder
    remedy = "Set data.tokenizer to a folder or hub id with a tokenizer.json."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    # transformers and tokenizers raise OSError, ValueError, KeyError, ImportError and bare Exception for bad files.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"Tokenizer {name}: none can be loaded from {folder} ({type(error).__name__}: {first_line}). {remedy}"
        ) from error
    tokenizer.init_kwargs.pop("auto_map", None)  # names code that comes with it: no folder that we write shall
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UserError(f"Tokenizer {name}: expected a fast tokenizer, found {kind}, written in Python. {remedy}")
    return tokenizer


class TensorFiles:
    """Reads tensors by name, each from a mapping of its own: pages of one over all weights would stay resident."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._files = {span.name: file for file in weight_files(folder, name) for span in read_spans(file)}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def read(self, name: str) -> "Tensor":
        """Read one tensor, in the dtype in which it is stored."""
        from safetensors import safe_open

        if name not in self._files:
            raise UserError(
                f"Base {self.name}: expected the tensor {name} in {self.folder}, found none of that name. "
                "Save the model again with transformers' save_pretrained."
            )
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a transformers folder's weights: names, dtypes, shapes and bytes of all tensors.

    It does not depend on sharding or on other files. The result is kept in the cache under the files' paths, sizes
    and times; if the cache cannot be written, it is computed each time. A few MB of memory are enough.
    """
    files = weight_files(folder, str(folder))
    stats = [(file.resolve(), file.stat()) for file in files]
    key: dict[str, Json] = {
        "format": _FINGERPRINT_FORMAT,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    }
    file_of_result = cache_root() / "fingerprints" / f"{hash_key(key)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(file_of_result.read_text(encoding="utf-8"))["fingerprint"])
    spans = sorted((span for file in files for span in read_spans(file)), key=lambda span: span.name)
    total = hashlib.sha256(f"qlora_lightning fingerprint {_FINGERPRINT_FORMAT}\n".encode())
    with ThreadPoolExecutor(_THREADS) as pool:
        for span, digest in zip(spans, pool.map(_hash_span, spans), strict=True):
            total.update(json.dumps([span.name, span.dtype, span.shape, digest]).encode())
    with suppress(OSError):
        make_root()
        write_whole(file_of_result, {"fingerprint": total.hexdigest(), **key})
    return total.hexdigest()


def _hash_span(span: TensorSpan) -> str:
    digest = hashlib.sha256()
    # Read, not mapped: mapped pages of 16 GB would all count as resident while the loop runs over them.
    with span.file.open("rb") as stream:
        stream.seek(span.start)
        for start in range(0, span.size_bytes, _CHUNK_BYTES):
            digest.update(stream.read(min(_CHUNK_BYTES, span.size_bytes - start)))
    return digest.hexdigest()
