"""GGUF files: one unpacked into an ordinary transformers folder, once; an adapter written as one, for llama.cpp."""

import io
import logging
import math
import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lightning.sources.cache import Json, cached_folder
from qlora_lightning.sources.tensors import check_loaded, format_bytes, save_model
from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.errors import UserError, explaining

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

CONVERT = "Merge without --gguf, and convert the folder with llama.cpp's convert_hf_to_gguf.py."
_MODEL_TYPES = ("llama", "qwen2", "qwen3")  # whose files are verified; llama.cpp has the same names
_log = logging.getLogger(__name__)


def unpack_gguf(file: Path, name: str) -> Path:
    """Return a bf16 transformers folder with weights, configs, tokenizer and chat template of a GGUF, from the cache.

    The checksums of weights are not compared: a usual start reads only config and tokenizer.
    """
    file = file.resolve()
    status = file.stat()
    key: dict[str, Json] = {
        "path": str(file),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "format": 2,  # incremented whenever the same GGUF would be unpacked differently
        "transformers": version("transformers"),
    }

    def build(folder: Path) -> None:
        _log.info("Unpacking %s (%s), once; kept in %s", file.name, format_bytes(status.st_size), folder.parent)
        with quiet_loggers(logging.ERROR, "transformers"), redirect_stderr(io.StringIO()):
            _unpack(file, folder, name)

    return cached_folder("unpacked", key, build, label=file.name, check_weights=False)


def _unpack(file: Path, folder: Path, name: str) -> None:
    from transformers import GenerationConfig

    with explaining(
        f"Base {name}: {file} cannot be read as a GGUF model: download it again, or give a folder", "base.gguf"
    ):
        model, tokenizer = _load(file, name)
    config = model.config
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in (None, *eos_ids):
        config.eos_token_id = [tokenizer.eos_token_id, *(token_id for token_id in eos_ids if token_id is not None)]
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    vars(config).pop("_model_name_or_path", None)  # the GGUF's title, which cannot be loaded
    save_model(model, folder)
    tokenizer.save_pretrained(folder)


def _load(file: Path, name: str) -> tuple[Any, Any]:
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(file.parent, **source)
    if config.model_type != "llama":
        raise UserError(
            f"Base {name}: expected a GGUF of a LLaMA-family model, found type {config.model_type!r}.", "base.gguf"
        )
    reader = gguf.GGUFReader(file)
    tensor_names = {tensor.name for tensor in reader.tensors}
    config.attention_bias, config.mlp_bias = "blk.0.attn_q.bias" in tensor_names, "blk.0.ffn_up.bias" in tensor_names
    _restore_rope(reader, config, name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    # transformers 5.17 uses the bos token as eos token, and drops the pad token
    if tokenizer.eos_token_id == tokenizer.bos_token_id and isinstance(config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if tokenizer.pad_token_id is None and config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    model, report = AutoModelForCausalLM.from_pretrained(
        file.parent,
        config=config,  # else the vocabulary is parsed once more, for seconds
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        use_kernels=False,  # of the hub, the default of transformers 5.25
        output_loading_info=True,
        **source,
    )
    check_loaded(report, file, {})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    loaded = {names.get_name(key, (".weight", ".bias")) for key in model.state_dict()}
    if left_out := tensor_names - loaded - {_ROPE_FACTORS}:
        raise _left_out(name, f"the tensor {min(left_out)}")
    return model, tokenizer


# ---- what transformers does not read, and raises no error ------------------------------------------------------------

_ROPE_FACTORS = "rope_freqs.weight"  # a tensor of Llama 3.1 and later
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _left_out(name: str, what: str) -> UserError:
    return UserError(
        f"Base {name}: {what} of a GGUF cannot be loaded by transformers, and without it the model computes something "
        "else. Give the model's hub id or folder, with safetensors files.",
        "base.gguf",
    )


def _restore_rope(reader: Any, config: Any, name: str) -> None:
    """Set Llama 3's scaling of rotary embeddings in a config if the file has it; reject any other scaling."""
    import torch

    values = {key: reader.fields[key].contents() for key in reader.fields if key.startswith("llama.rope.scal")}
    factor = values.get("llama.rope.scaling.factor", values.get("llama.rope.scale_linear", 1.0))
    kind = values.get("llama.rope.scaling.type", "linear")  # llama.cpp's default
    if kind != "none" and (kind, factor) not in (("linear", 0.0), ("linear", 1.0)):
        raise _left_out(name, f"llama.rope.scaling ({kind}, factor {factor:g})")
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            factors = torch.tensor(tensor.data)
            rope = {"rope_type": "llama3", "factor": round(float(factors.max())), **_LLAMA_3}
            config.rope_parameters = config.rope_parameters | rope
            expected = rope_factors(config)
            if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
                raise _left_out(name, f"the tensor {_ROPE_FACTORS}, whose numbers are not Llama 3's,")


def rope_factors(config: Any) -> "Tensor":
    """Return the divisors ``(head_dim / 2,)`` of a config with Llama 3's scaling for each rotary frequency."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    inv_freq = LlamaRotaryEmbedding(config).inv_freq.float()
    factors: Tensor = config.rope_parameters["rope_theta"] ** -(torch.arange(len(inv_freq)) / len(inv_freq)) / inv_freq
    return factors


# ---- writing ---------------------------------------------------------------------------------------------------------


def architecture_of(config: Any) -> Any:
    """Return llama.cpp's architecture of a model; raise UserError if files of its type are not verified."""
    import gguf

    model_type = getattr(config, "wrapper", config.model_type)
    if model_type not in _MODEL_TYPES:
        raise UserError(
            f"--gguf writes models of the types {', '.join(_MODEL_TYPES)}, not of {model_type}. {CONVERT}", "gguf.type"
        )
    return gguf.MODEL_ARCH[config.model_type.upper()]


def permute_rows(name: str, rows: "npt.NDArray[Any]", config: Any) -> "npt.NDArray[Any]":
    """Put rows ``(out, …)`` of a LLaMA's queries and keys into llama.cpp's order, with rotated pairs side by side.

    transformers rotates the first half of a head's rows against the second, and so does llama.cpp in the other
    architectures. Other tensors are returned as they are.
    """
    match = re.search(r"\.(q|k)_proj\.", name)
    if match is None or config.model_type != "llama":
        return rows
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    half_dim = rows.shape[0] // heads // 2
    pairs = rows.reshape(heads, 2, half_dim, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_adapter(file: Path, folder: Path, settings: Mapping[str, Any], config: Any, kind: str) -> None:
    """Write the adapter of a folder as a GGUF file, which llama.cpp adds to its base by ``--lora``.

    Args:
        file: The file to write.
        folder: The adapter folder.
        settings: Its ``adapter_config.json``.
        config: transformers' config of the base.
        kind: Type of the tensors, ``f16`` or ``f32``.

    Raises:
        UserError: llama.cpp has no tensors for the type of model, or for all that the adapter trains.
    """
    import gguf
    import numpy as np
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    architecture = architecture_of(config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors, alpha = load_file(folder / "adapter_model.safetensors"), float(settings["lora_alpha"])
    if not alpha:
        raise UserError(
            f"lora_alpha of {folder} is 0, which llama.cpp takes for none: merge the adapter.", "gguf.adapter"
        )
    alphas = settings.get("alpha_pattern") or {}
    dtype: type[np.floating[Any]] = np.float16 if kind == "f16" else np.float32
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.ALL_F32)
    for key, stored in tensors.items():
        tensor: Any = stored.float().numpy()
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key)
        name = None if match is None else names.get_name(f"{match[1]}.weight", (".weight",))
        is_tied = name == "output.weight" and config.tie_word_embeddings  # of which a file has the embedding only
        if match is None or name is None or is_tied:
            raise UserError(
                f"--adapter-gguf writes LoRA of linears, and llama.cpp has no place for {key} of {folder}: merge the "
                "adapter, with --gguf.",
                "gguf.adapter",
            )
        if match[2] == "B":  # llama.cpp multiplies by alpha / rank
            own_alpha = alphas.get(get_pattern_key(list(alphas), match[1]), alpha)
            rank = tensor.shape[1]
            factor = own_alpha / alpha * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
            tensor = permute_rows(f"{match[1]}.weight", tensor * np.float32(factor), config)
        if np.abs(tensor).max() > np.finfo(dtype).max:
            raise UserError(f"{key} of {folder} has values beyond {kind}: use --adapter-gguf f32.", "gguf.adapter")
        writer.add_tensor(f"{name}.lora_{match[2].lower()}", np.ascontiguousarray(tensor.astype(dtype)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
