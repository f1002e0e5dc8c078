"""Runs a model whose weights are filled in layer by layer: all rows go through one layer, then the next is filled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.layers.attention import NO_MASK
from qlora_lightning.model.loss import IGNORED
from qlora_lightning.model.weights.base_weights import Weights
from qlora_lightning.model.weights.hollow_base import filled

_HEAD_ROWS = 16_384  # of the head's weight that are turned into fp32 at a time


class Judged:
    """The states from which a model's logits at the labelled tokens are made, and its head.

    Args:
        hidden: ``(labelled tokens, width)``, fp32, after the final norm.
        head: The head, filled.
    """

    def __init__(self, hidden: Tensor, head: nn.Module) -> None:
        self.hidden, self.head = hidden, head

    def logits(self, part: slice) -> Tensor:
        """Give the logits ``(tokens, vocabulary)`` of some of the labelled tokens, fp32."""
        hidden = self.hidden[part]
        if _dtype_of(self.head) is not None or self.head.bias is not None:
            logits: Tensor = self.head(hidden)
            return logits
        rows: Any = self.head.weight.split(_HEAD_ROWS)
        return torch.cat([hidden @ some.float().t() for some in rows], dim=-1)


@torch.no_grad()
def run_layerwise(
    model: Any,
    weights: Weights,
    batches: Sequence[Mapping[str, Any]],
    judge: Callable[[Judged], Any],
    advance: Callable[[], object] = lambda: None,
) -> Any:
    """Run flat batches through a LLaMA in fp32, and judge what it says at the labelled tokens.

    Args:
        model: The causal language model, empty or with an adapter; see
            :mod:`qlora_lightning.model.weights.hollow_base`.
        weights: What it is filled with.
        batches: As the data module makes them.
        judge: Is handed the states and the head; what it gives is returned.
        advance: Called after every layer.
    """
    inner = model.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with filled(embedding, "model.embed_tokens", weights, _dtype_of(embedding)):
        hidden = [embedding(batch["input_ids"]).float() for batch in batches]
    for number, layer in enumerate(inner.layers):
        with filled(layer, f"model.layers.{number}", weights, torch.float32):
            for place, batch in enumerate(batches):
                hidden[place] = _run(layer, inner.rotary_emb, hidden[place], batch)
        advance()
    with filled(inner.norm, "model.norm", weights, torch.float32):
        labelled = torch.cat([inner.norm(_labelled(*pair)) for pair in zip(hidden, batches, strict=True)])
    with filled(head, "lm_head", weights, _dtype_of(head)):
        return judge(Judged(labelled, head))


def _run(layer: nn.Module, rotary: nn.Module, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    positions = batch["position_ids"]
    output = layer(
        hidden,
        attention_mask=NO_MASK,
        position_ids=positions,
        position_embeddings=rotary(hidden, position_ids=positions),
        cu_seqlens=batch["cu_seqlens"],
        longest=batch["longest"],
        use_cache=False,
    )
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _labelled(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    positions = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
    return hidden[0, positions]  # (labelled tokens, width)


def labels_of(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Give the labels of batches, ``(labelled tokens,)``, in the order of :class:`Judged`."""
    parts = [batch["labels"][0, 1:] for batch in batches]
    return torch.cat([part[part != IGNORED] for part in parts])


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """fp32 where an adapter works on it; else as stored: the table of a large vocabulary is the largest tensor."""
    return None if type(module) in (nn.Linear, nn.Embedding) else torch.float32
