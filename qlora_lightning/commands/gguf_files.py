"""GGUF files for llama.cpp: a merged model, tensor by tensor, with its tokenizer."""

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from qlora_lightning.model.merge import MergePlan
from qlora_lightning.sources.folders import BaseFolder, TensorFiles, resolve_base
from qlora_lightning.sources.gguf import rope_factors
from qlora_lightning.support.console import progress_counter
from qlora_lightning.support.errors import UserError

Array = npt.NDArray[Any]
_MODEL_TYPES = ("llama", "qwen2", "qwen3")  # whose files are verified; llama.cpp has the same names
_CONVERT = "Merge without --gguf, and convert the folder with llama.cpp's convert_hf_to_gguf.py."
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the regular expressions by which tokenizers split text
_SPLITS = {
    rf"{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}": "qwen2",
}


def architecture_of(config: Any) -> Any:
    """Return llama.cpp's architecture of a model; raise UserError if files of its type are not verified."""
    model_type = getattr(config, "wrapper", config.model_type)
    if model_type not in _MODEL_TYPES:
        raise UserError(
            f"--gguf writes models of the types {', '.join(_MODEL_TYPES)}, not of {model_type}. {_CONVERT}", "gguf.type"
        )
    return gguf.MODEL_ARCH[config.model_type.upper()]


def check_gguf(folder: Path, plan: MergePlan, base: BaseFolder) -> None:
    """Raise UserError if rotary embedding or tokenizer of a folder, which needs no weights, cannot be written."""
    _rope_factors(plan)
    _read_tokenizer(folder, base)


def write_gguf(folder: Path, plan: MergePlan, kind: str, base: BaseFolder) -> Path:
    """Write a merged model's folder as a GGUF file, tensor by tensor, and return the file.

    Args:
        folder: Folder of the merged model; the file gets a folder of its own in it, since beside a tokenizer's files
            transformers misreads the tokenizer in a GGUF.
        plan: Plan of the merged tensors.
        kind: Type of matrices, ``f16`` or ``q8_0``.
        base: The base; if it is a GGUF, its file says how text is split.
    """
    config, file = plan.config, folder / "gguf" / f"model-{kind}.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture_of(config)])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(base.name).name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config.vocab_size, base)
    factors = _rope_factors(plan)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    types = {name: _choose_type(shape, kind) for name, shape in plan.shapes.items()}
    names = gguf.get_tensor_name_map(architecture_of(config), config.num_hidden_layers)
    for name, shape in plan.shapes.items():
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, types[name]))
        gguf_name = names.get_name(name, (".weight", ".bias"))
        if gguf_name is None:
            raise UserError(f"--gguf: llama.cpp has no place for the tensor {name}. Leave --gguf out.")
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), size, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    tensors = TensorFiles(folder, str(folder))
    with progress_counter("gguf", len(types)) as advance:
        for name, quantization in types.items():
            values = _permute_rows(name, tensors.read(name).float().numpy(), config)
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), quantization))
            advance(1)
    writer.close()
    return file


# ---- tensors and shape -----------------------------------------------------------------------------------------------


def _permute_rows(name: str, rows: Array, config: Any) -> Array:
    """Put rows ``(out, …)`` of a LLaMA's queries and keys into llama.cpp's order, with rotated pairs side by side.

    transformers rotates the first half of a head's rows against the second, and so does llama.cpp in the other
    architectures. Other tensors are returned as they are.
    """
    match = re.search(r"\.(q|k)_proj\.", name)
    if match is None or architecture_of(config) != gguf.MODEL_ARCH.LLAMA:
        return rows
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    half_dim = rows.shape[0] // heads // 2
    pairs = rows.reshape(heads, 2, half_dim, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _choose_type(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """Choose fp32 for vectors, ``kind`` for matrices, and f16 if their rows are not made of full blocks."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    quantization = GGMLQuantizationType[kind.upper()]
    block_size, _ = gguf.GGML_QUANT_SIZES[quantization]
    return quantization if shape[-1] % block_size == 0 else GGMLQuantizationType.F16


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _rope_factors(plan: MergePlan) -> Array | None:
    """Return the divisors of Llama 3's scaling for each frequency, ``(head_dim / 2,)``; None without scaling."""
    rope = plan.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] != "llama3":
        raise UserError(f"--gguf writes no rotary embeddings of the kind {rope['rope_type']}. {_CONVERT}")
    return rope_factors(plan.config).numpy().astype(np.float32)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, base: BaseFolder) -> None:
    """Write tokens, their types, merges, special ids and the chat template of a tokenizer's folder.

    Rows of the embedding (``vocabulary`` in all) without a token are marked as unused.
    """
    content, split = _read_tokenizer(folder, base)
    types = gguf.TokenType
    tokens = {token_id: (text, types.NORMAL) for text, token_id in content["model"]["vocab"].items()}
    for token in content.get("added_tokens", []):
        tokens[token["id"]] = (token["content"], types.CONTROL if token["special"] else types.USER_DEFINED)
    rows = [tokens.get(token_id, (f"[PAD{token_id}]", types.UNUSED)) for token_id in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    # without this key llama.cpp begins every prompt with a BOS; templates write their own
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _read_tokenizer(folder: Path, base: BaseFolder) -> tuple[dict[str, Any], str]:
    """Return the content of a tokenizer's file, and llama.cpp's name for how it splits text."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"].get("type") != "BPE" or content["model"].get("byte_fallback"):
        raise UserError(f"--gguf writes tokenizers of bytes, as of Llama 3 and Qwen; this is another. {_CONVERT}")
    if base.kind == "gguf":  # whose file names it
        field = gguf.GGUFReader(resolve_base(base.name)[0]).get_field(gguf.Keys.Tokenizer.PRE)
        if field is not None:
            return content, str(field.contents())
    return content, _name_split(content.get("pre_tokenizer") or {})


def _name_split(pre_tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"] and parts[0].get("pattern", {}).get("Regex") in _SPLITS:
        return _SPLITS[parts[0]["pattern"]["Regex"]]
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    raise UserError(f"--gguf: llama.cpp's name for how this tokenizer splits text is unknown here. {_CONVERT}")
