"""A base that is a GGUF file, unpacked into an ordinary transformers folder, once."""

import io
import logging
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lightning.sources.cache import Json, cached_folder
from qlora_lightning.sources.tensors import check_loaded, format_bytes, save_model
from qlora_lightning.support.console import quiet_loggers
from qlora_lightning.support.errors import UserError, explaining

if TYPE_CHECKING:
    from torch import Tensor

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
