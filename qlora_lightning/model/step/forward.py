"""A flat batch through the model, up to the states from which its labels are predicted."""

import inspect
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qlora_lightning.model.anatomy import runs_flat
from qlora_lightning.model.layers.attention import NO_MASK, FlatBatch, flat_batch, has_dropout
from qlora_lightning.model.layers.decoder_layer import cast_adapters
from qlora_lightning.model.step.layout import Layout, add_noise
from qlora_lightning.support.errors import UserError


def skips_unlabelled(causal_lm: Any, noise_alpha: float | None, *, fast: bool) -> bool:
    """Whether the loss is computed without the tokens that it does not need, and shared ones once.

    Not where each token is to draw numbers of its own: for NEFTune's noise, or for dropout.
    """
    is_flat = fast and runs_flat(causal_lm.config)
    return is_flat and noise_alpha is None and not (causal_lm.training and has_dropout(causal_lm))


def compute_states(causal_lm: Any, layout: Layout, noise_alpha: float | None, *, fast: bool) -> Tensor:
    """Compute the last hidden states from which labels are predicted, ``(K, width)``, samples in the batch's order.

    Of a type that runs a row at a time it is their logits, ``(K, vocabulary)``, which
    :func:`~qlora_lightning.model.step.loss.lm_head_of` knows.

    Args:
        causal_lm: The model of transformers, its adapters in it.
        layout: Of the batch, on the model's device.
        noise_alpha: Strength of NEFTune's noise on the embeddings; ``None``: none.
        fast: Whether attention is fast, and a GPU's adapters are cast all at once.
    """
    tokens: dict[str, Tensor] = {"input_ids": layout.input_ids}
    embedding = causal_lm.get_input_embeddings()
    if noise_alpha is not None or any(each.dtype != causal_lm.dtype for each in embedding.parameters()):
        embedded = embedding(layout.input_ids).to(causal_lm.dtype)  # one that trains is in float32
        noisy = embedded if noise_alpha is None else add_noise(embedded, layout.samples, noise_alpha)
        tokens = {"inputs_embeds": noisy}
    if "input_ids" not in tokens and getattr(causal_lm.config, "hidden_size_per_layer_input", None):
        raise UserError(
            f"A {causal_lm.config.model_type} looks tokens up in each layer: model.neftune_alpha, and embeddings that "
            "train, do not work with it."
        )
    if not runs_flat(causal_lm.config):
        return torch.cat(list(_compute_rows(causal_lm, layout, tokens)))
    casts = cast_adapters(causal_lm) if fast and layout.input_ids.is_cuda else {}
    with flat_batch(FlatBatch(layout.samples, casts, fast)):
        hidden: Tensor = causal_lm.base_model(
            **tokens, position_ids=layout.position_ids, attention_mask=NO_MASK, use_cache=False
        ).last_hidden_state  # (1, n_tokens, width)
    return hidden[0].index_select(0, layout.predict_index)


def _compute_rows(causal_lm: Any, layout: Layout, tokens: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the logits of each row's predictions, ``(k, vocabulary)``, by the model's own forward for it alone."""
    keeps = "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
    indices = torch.split(layout.predict_index, list(layout.counts))
    for (start, end), index in zip(pairwise(layout.samples.bounds), indices, strict=True):
        row, index = {name: each[:, start:end] for name, each in tokens.items()}, index - start
        logits: Tensor = causal_lm(**row, use_cache=False, **({"logits_to_keep": index} if keeps else {})).logits[0]
        yield logits if keeps else logits.index_select(0, index)
