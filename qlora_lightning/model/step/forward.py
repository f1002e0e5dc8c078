"""A flat batch through the model, up to the states from which its labels are predicted."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_lightning.model.layers.attention import NO_MASK, has_dropout, has_ragged_kernel
from qlora_lightning.model.layers.decoder_layer import cast_adapters
from qlora_lightning.model.step.batch import check_row_length
from qlora_lightning.model.step.layout import Layout, add_noise, lay_out


def skips_unlabelled(causal_lm: Any, noise_alpha: float | None, *, fast: bool) -> bool:
    """Whether the loss is computed without the tokens that it does not need, and shared ones once.

    Not where each token is to draw numbers of its own: for NEFTune's noise, or for dropout.
    """
    return fast and noise_alpha is None and not (causal_lm.training and has_dropout(causal_lm))


def pads_samples(causal_lm: Any, device: torch.device) -> bool:
    """Whether attention takes samples that are padded to the longest: on cards without a kernel for ragged ones."""
    return not (device.type == "cpu" or has_ragged_kernel(device, causal_lm.dtype))


def build_layout(
    causal_lm: Any, batch: Mapping[str, Any], device: torch.device, noise_alpha: float | None, *, fast: bool
) -> Layout:
    """Lay a flat batch out as a model computes it, on the host.

    Args:
        causal_lm: The model of transformers.
        batch: See :func:`~qlora_lightning.model.step.layout.lay_out`.
        device: Where the model computes.
        noise_alpha: See :func:`compute_states`.
        fast: Whether tokens that no label needs may be left out, and a CPU's stream filled up.

    Raises:
        UserError: A row is too long for the base's rotary embedding.
    """
    skips = skips_unlabelled(causal_lm, noise_alpha, fast=fast)
    pads = pads_samples(causal_lm, device)
    layout = lay_out(batch, skips_unlabelled=skips, fills=fast and device.type == "cpu", pads=pads)
    check_row_length(causal_lm.config, layout.samples.longest)
    return layout


def compute_states(causal_lm: Any, layout: Layout, noise_alpha: float | None, *, fast: bool) -> Tensor:
    """Compute the last hidden states from which labels are predicted, ``(K, width)``, samples in the batch's order.

    Args:
        causal_lm: The model of transformers, its adapters in it.
        layout: Of the batch, on the model's device.
        noise_alpha: Strength of NEFTune's noise on the embeddings; ``None``: none.
        fast: Whether a GPU's adapters are cast all at once.
    """
    tokens: dict[str, Tensor] = {"input_ids": layout.input_ids}
    if noise_alpha is not None:
        embeddings = causal_lm.get_input_embeddings()(layout.input_ids)
        tokens = {"inputs_embeds": add_noise(embeddings, layout.samples, noise_alpha)}
    hidden: Tensor = causal_lm.base_model(
        **tokens,
        position_ids=layout.position_ids,
        attention_mask=NO_MASK,
        samples=layout.samples,
        casts=cast_adapters(causal_lm) if fast and layout.input_ids.is_cuda else None,
        use_cache=False,
    ).last_hidden_state  # (1, n_tokens, width)
    return hidden[0].index_select(0, layout.predict_index)
