"""A merged model as a GGUF file, written tensor by tensor."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from qlora_lightning.commands.merge.gguf_tensors import choose_storage, encode, map_name
from qlora_lightning.commands.merge.gguf_tokenizer import add_tokenizer
from qlora_lightning.model.weights.merging import MergePlan
from qlora_lightning.support.errors import UserError

_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFModelWriter:
    """Takes the tensors of a merged model in the order of the plan, and writes each at once.

    Args:
        file: Where to.
        plan: What the tensors are.
        kind: ``f16`` or ``q8_0``.
        tokenizer: Folder with the tokenizer's files.
        title: Name of the model.
        split: See :func:`qlora_lightning.commands.merge.gguf_tokenizer.add_tokenizer`.

    Raises:
        UserError: The config or the tokenizer is of a kind that is not written.
    """

    def __init__(self, file: Path, plan: MergePlan, kind: str, tokenizer: Path, title: str, split: str | None) -> None:
        self._config = plan.config
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(title)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_shape(writer, self._config)
        add_tokenizer(writer, tokenizer, self._config.vocab_size, split)
        self._stored = {name: choose_storage(shape, kind) for name, shape in plan.shapes.items()}
        factors = _rope_factors(plan)
        if factors is not None:
            writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        layers = self._config.num_hidden_layers
        for name, shape in plan.shapes.items():
            stored = self._stored[name]
            writer.add_tensor_info(
                map_name(name, layers), shape, np.dtype(np.float32), stored.size_bytes, raw_dtype=stored.raw
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        self._writer = writer

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        self._writer.write_tensor_data(encode(tensor, name, self._stored[name], self._config))

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


def add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write what a LLaMA's config says of its shape.

    Raises:
        UserError: Its rotary embedding is of a kind that is not written.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] not in ("default", "llama3"):
        raise UserError(
            f"--gguf writes rotary embeddings of the kinds default, linear and llama3; this is {rope['rope_type']}. "
            "Merge without --gguf, and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )


def _rope_factors(plan: MergePlan) -> Any:
    """Give by what Llama 3.1's scaling divides each frequency, ``(head_dim / 2,)``; nothing for other kinds."""
    config = plan.config
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled = plan.model.get_base_model().model.rotary_emb.inv_freq.float()
    steps = torch.arange(len(scaled)) / len(scaled)
    factors: Tensor = config.rope_parameters["rope_theta"] ** -steps / scaled
    return factors.numpy().astype(np.float32)
