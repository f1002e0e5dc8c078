"""Forward pass of a micro-batch, up to the hidden states that predict its labels."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.layers.attention import NO_MASK, PackedPass, packed_pass
from qlora_lightning.model.layers.decoder_layer import prepare_layers
from qlora_lightning.model.layers.lora import device_of_autocast
from qlora_lightning.model.model_types import runs_packed
from qlora_lightning.model.step.layout import MicroBatch, add_noise
from qlora_lightning.support.errors import UserError


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Compute without dropout and noise; afterwards restore the mode of each part, since some may be frozen in one."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training


def compute_states(causal_lm: Any, micro_batch: MicroBatch, noise_alpha: float | None, *, fused: bool) -> Tensor:
    """Compute the last hidden states that predict labels, ``(K, width)``, samples in the batch's order.

    A type that runs a row at a time gives their logits, ``(K, vocabulary)``, as
    :func:`~qlora_lightning.model.step.loss.lm_head_of` expects. ``noise_alpha`` is NEFTune's strength of noise;
    ``fused``: attention is fused, and adapters are cast all at once.
    """
    inputs: dict[str, Tensor] = {"input_ids": micro_batch.input_ids}
    embedding = causal_lm.get_input_embeddings()
    if noise_alpha is not None or any(param.dtype != causal_lm.dtype for param in embedding.parameters()):
        embeds = embedding(micro_batch.input_ids).to(causal_lm.dtype)  # one that trains is in float32
        embeds = embeds if noise_alpha is None else add_noise(embeds, micro_batch.sequences, noise_alpha)
        inputs = {"inputs_embeds": embeds}
    if "input_ids" not in inputs and getattr(causal_lm.config, "hidden_size_per_layer_input", None):
        key = "model.lora_options" if noise_alpha is None else "model.neftune_alpha"
        raise UserError(
            f"A {causal_lm.config.model_type} looks tokens up in each layer: its embeddings can neither be trained nor "
            f"get noise. Leave {key} out.",
            key,
        )
    if not runs_packed(causal_lm.config):
        return torch.cat(list(_compute_rows(causal_lm, micro_batch, inputs)))
    autocasts = torch.is_autocast_enabled(device_of_autocast(micro_batch.input_ids))
    layers = prepare_layers(causal_lm) if fused and not autocasts else {}
    with packed_pass(PackedPass(micro_batch.sequences, layers, fused)):
        hidden: Tensor = causal_lm.base_model(
            **inputs, position_ids=micro_batch.position_ids, attention_mask=NO_MASK, use_cache=False
        ).last_hidden_state  # (1, n_tokens, width)
    return hidden[0].index_select(0, micro_batch.predict_index)


def _compute_rows(causal_lm: Any, micro_batch: MicroBatch, inputs: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the logits of each row's predictions, ``(k, vocabulary)``, by the model's own forward of one row."""
    takes_index = "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
    indices = torch.split(micro_batch.predict_index, list(micro_batch.counts))
    for (start, end), index in zip(pairwise(micro_batch.sequences.bounds), indices, strict=True):
        row, index = {name: tensor[:, start:end] for name, tensor in inputs.items()}, index - start
        options = {"logits_to_keep": index} if takes_index else {}
        logits: Tensor = causal_lm(**row, use_cache=False, **options).logits[0]
        yield logits if takes_index else logits.index_select(0, index)
