"""Greedy answers of a model to rendered prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def generate_answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, stop_ids: Sequence[int], max_new_tokens: int = 128
) -> list[list[int]]:
    """Continue each prompt greedily until a stop token; the prompts form one batch, padded on the left.

    The model's training mode is put back afterwards: a model that generated would else stay in ``eval()``.

    Args:
        model: A causal language model of transformers or PEFT.
        prompts: Token ids of each prompt.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Tokens after which an answer is cut.

    Returns:
        The ids of each answer, without the stop token.
    """
    if not prompts:  # a rank without rows
        return []
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    padding: int = stop_ids[0]  # any id will do: the mask hides it
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    was_training = model.training
    model.eval()
    try:
        output = _generate(model, ids, mask, list(stop_ids), padding, max_new_tokens)
    finally:
        model.train(was_training)
    return [_cut(row, stop_ids) for row in output[:, longest:].tolist()]


@torch.no_grad()
def _generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, stop_ids: list[int], padding: int, max_new_tokens: int
) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        # a base's own sampling settings would be warned about, since this is greedy
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=padding,
    )
    return output


def _cut(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0]] if ends else ids
