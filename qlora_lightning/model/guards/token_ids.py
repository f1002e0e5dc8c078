"""Refuses tokens that the base does not have."""

from collections.abc import Mapping
from typing import Any

import torch

from qlora_lightning.errors import UserError
from qlora_lightning.model.batch.rows import join_places, row_places


def check_token_ids(batch: Mapping[str, Any], vocabulary: int, data: Any) -> None:
    """Refuse a token id that has no row in the embedding.

    A token that stands only at the end of rows, as a stop token does, is never looked up there, for its state predicts
    nothing: else only the loss would meet it, as a label.

    Args:
        batch: ``input_ids``, ``(1, tokens)``, ``cu_seqlens`` and, for the message, ``row_ids``.
        vocabulary: Rows of the embedding.
        data: The Trainer's data module, or ``None``: it knows the places of training rows.

    Raises:
        UserError: An id is negative, or not below the vocabulary.
    """
    ids = batch["input_ids"][0]
    outside = ((ids < 0) | (ids >= vocabulary)).nonzero()[:, 0]
    if not len(outside):
        return
    first = outside[:1]
    sample = int(torch.searchsorted(batch["cu_seqlens"].to(first), first, right=True)) - 1
    rows = [] if batch.get("row_ids") is None else batch["row_ids"][sample : sample + 1].tolist()
    place = f" of {join_places(row_places(data, rows))}" if rows else ""
    raise UserError(
        f"A token{place} has the id {int(ids[first]):,}, and the base has embeddings only for ids below "
        f"{vocabulary:,}: the tokenizer has tokens that the base lacks, such as a stop token that was added to it. "
        "Use the base's own tokenizer, or a base whose embedding was resized for this one."
    )
