"""NEFTune: uniform noise on the embeddings while training."""

from typing import Any

import torch
from torch import Tensor

from qlora_lightning.model.layout import Layout
from qlora_lightning.support.errors import UserError


def check_neftune_alpha(alpha: float | None) -> None:
    """Refuse a strength that is none.

    Raises:
        UserError: It is not positive.
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"model.neftune_alpha is {alpha:g}: expected a positive number, such as 5, or null.")


def embed_or_name(causal_lm: Any, layout: Layout, alpha: float | None) -> dict[str, Tensor]:
    """Give what a model of transformers reads of a stream: its ids, or with ``alpha`` their noisy embeddings.

    Args:
        causal_lm: Whose embedding it is.
        layout: Of the batch, with all its tokens.
        alpha: Of the noise; ``None`` for none.
    """
    if alpha is None:
        return {"input_ids": layout.input_ids}
    embeddings = causal_lm.get_input_embeddings()(layout.input_ids)
    return {"inputs_embeds": add_noise(embeddings, layout.samples.cu_seqlens, alpha)}


def add_noise(embeddings: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """Add to each token's embedding noise from ``U(-1, 1) · alpha / sqrt(L · width)``.

    L is the length of the token's sample, as in Jain et al. 2023 (algorithm 1), who have it that of the padded batch in
    their code. Drawn from torch's generator of the device, as dropout is.

    Args:
        embeddings: ``(1, tokens, width)``.
        cu_seqlens: Where samples begin and the last one ends, ``(samples + 1,)``.
        alpha: Strength.
    """
    lengths = cu_seqlens.diff()
    of_token = lengths.repeat_interleave(lengths, output_size=embeddings.shape[1])  # (tokens,)
    scale = alpha / (of_token * embeddings.shape[2]).float().sqrt()
    noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1).mul_(scale[:, None])
    return embeddings + noise.to(embeddings.dtype)
