"""Greedy answers by transformers' own ``generate``: for a model that does not attend to flat batches."""

from collections.abc import Collection, Sequence
from typing import Any

import torch


@torch.no_grad()
def generate_padded(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """Continue each prompt greedily until a stop token; the prompts form one batch, padded on the left.

    Args:
        model: A causal language model of transformers or PEFT, in evaluation mode.
        prompts: Token ids of each prompt.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Tokens after which an answer is cut.

    Returns:
        The ids of each answer, without the stop token.
    """
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    padding = min(stop_ids)  # any id will do: the mask hides it
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    output: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        # a base's own sampling settings would be warned about, since this is greedy
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=padding,
    )
    return [_cut(row, stop_ids) for row in output[:, longest:].tolist()]


def _cut(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0]] if ends else ids
