"""GGUF files written for llama.cpp: a merged model, or an adapter alone."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from qlora_lightning.sources.folders import BaseFolder, TensorFiles
from qlora_lightning.sources.gguf import rope_factors
from qlora_lightning.support.console import progress_counter
from qlora_lightning.support.errors import UserError

Array = npt.NDArray[Any]
_CONVERT = "Merge without --gguf, and convert the folder with llama.cpp's convert_hf_to_gguf.py."
_MODEL_TYPES = ("llama", "qwen2", "qwen3")  # whose files are verified; llama.cpp has the same names
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


def permute_rows(name: str, rows: Array, config: Any) -> Array:
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


# ---- a merged model --------------------------------------------------------------------------------------------------


def begin_gguf(
    folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]], kind: str, base: BaseFolder
) -> gguf.GGUFWriter:
    """Begin the GGUF file of a merged model's folder, in which there need be no weights yet.

    Args:
        folder: Folder of the merged model; the file gets a folder of its own in it, since beside a tokenizer's files
            transformers misreads the tokenizer in a GGUF.
        config: transformers' config of the text model.
        shapes: Shapes of its tensors, by their names in the model.
        kind: Type of matrices, ``q8_0``; with any other they are written as ``f16``.
        base: The base; if it is a GGUF, its file says how text is split.

    Raises:
        UserError: The model's type, rotary embedding or tokenizer cannot be written.
    """
    kind = kind if kind == "q8_0" else "f16"
    file = folder / "gguf" / f"model-{kind}.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture_of(config)])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(base.name).name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config.vocab_size, base)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    names = gguf.get_tensor_name_map(architecture_of(config), config.num_hidden_layers)
    for name, shape in shapes.items():
        quantization = _choose_type(shape, kind)
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, quantization))
        gguf_name = names.get_name(name, (".weight", ".bias"))
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), size, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    return writer


def finish_gguf(
    writer: gguf.GGUFWriter, folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]], kind: str
) -> Path:
    """Write the tensors of a merged model's folder into the GGUF file that was begun, one after the other.

    The k-quants are made from f16 by llama.cpp's program; without it the file of f16 stays. Returns the file.
    """
    file, tensors = Path(writer.path), TensorFiles(folder)
    with progress_counter("gguf", len(shapes)) as advance:
        for name, shape in shapes.items():
            values = np.ascontiguousarray(permute_rows(name, tensors.read(name).float().numpy(), config))
            writer.write_tensor_data(gguf.quants.quantize(values, _choose_type(shape, kind)))
            advance(1)
    writer.close()
    quantized = file.with_name(f"model-{kind}.gguf")
    if file == quantized or not shutil.which("llama-quantize"):
        return file
    command = ["llama-quantize", str(file), str(quantized), kind.upper()]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode:
        message = f"--gguf {kind}: llama-quantize failed:\n{process.stderr or process.stdout}"
        raise UserError(message, "gguf.llama_quantize")
    file.unlink()
    return quantized


def _choose_type(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """Choose fp32 for vectors; for matrices q8_0 if that is the kind and their rows are full blocks, else f16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
    is_q8_0 = kind == "q8_0" and shape[-1] % block_size == 0
    return GGMLQuantizationType.Q8_0 if is_q8_0 else GGMLQuantizationType.F16


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


def _rope_factors(config: Any) -> Array | None:
    """Return the divisors of Llama 3's scaling for each frequency, ``(head_dim / 2,)``; None without scaling."""
    kind = config.rope_parameters["rope_type"]
    if kind not in ("default", "llama3"):
        raise UserError(f"--gguf writes no rotary embeddings of the kind {kind}. {_CONVERT}")
    return rope_factors(config).numpy().astype(np.float32) if kind == "llama3" else None


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, base: BaseFolder) -> None:
    """Write tokens, their types, merges, special ids and the chat template of a tokenizer's folder.

    Rows of the embedding (``vocabulary`` in all) without a token are marked as unused.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"].get("type") != "BPE" or content["model"].get("byte_fallback"):
        raise UserError(f"--gguf writes tokenizers of bytes, as of Llama 3 and Qwen; this is another. {_CONVERT}")
    split = None
    if base.gguf_file is not None:  # which names it
        split = gguf.GGUFReader(base.gguf_file).get_field(gguf.Keys.Tokenizer.PRE)
    types = gguf.TokenType
    tokens = {token_id: (text, types.NORMAL) for text, token_id in content["model"]["vocab"].items()}
    for token in content.get("added_tokens", []):
        tokens[token["id"]] = (token["content"], types.CONTROL if token["special"] else types.USER_DEFINED)
    rows = [tokens.get(token_id, (f"[PAD{token_id}]", types.UNUSED)) for token_id in range(vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_split(content.get("pre_tokenizer") or {}) if split is None else split.contents())
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    # without this key llama.cpp begins every prompt with a BOS; templates write their own
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


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


# ---- an adapter ------------------------------------------------------------------------------------------------------


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
