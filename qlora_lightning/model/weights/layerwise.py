"""Runs a model layer by layer, to compare two that do not fit into memory together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.layers.attention import NO_MASK
from qlora_lightning.model.layout import IGNORED, whole_samples
from qlora_lightning.model.weights.base import Weights, filled

_HEAD_ROWS = 16_384  # of the head's weight that are turned into fp32 at a time


class LastStates:
    """The states from which a model's logits at the labelled tokens are made, and its head.

    Args:
        hidden: ``(labelled tokens, width)``, fp32, after the final norm.
        head: The head, filled.
    """

    def __init__(self, hidden: Tensor, head: nn.Module) -> None:
        self.hidden, self.head = hidden, head

    def logits(self, part: slice) -> Tensor:
        """Return the logits ``(tokens, vocabulary)`` of some of the labelled tokens, fp32."""
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
    evaluate: Callable[[LastStates], Any],
    advance: Callable[[], object] = lambda: None,
) -> Any:
    """Run flat batches through a LLaMA in fp32, and evaluate its last states at the labelled tokens.

    Args:
        model: The causal language model, hollow or with a real adapter.
        weights: What it is filled with.
        batches: As the data module makes them.
        evaluate: What it returns is returned.
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
        return evaluate(LastStates(labelled, head))


def _run(layer: nn.Module, rotary: nn.Module, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    positions = batch["position_ids"]
    output: Tensor = layer(
        hidden,
        attention_mask=NO_MASK,
        position_ids=positions,
        position_embeddings=rotary(hidden, position_ids=positions),
        samples=whole_samples(batch["cu_seqlens"].diff().tolist()),
        use_cache=False,
    )
    return output


def _labelled(hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    positions = (batch["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
    return hidden[0, positions]  # (labelled tokens, width)


def labels_of(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the labels of batches, ``(labelled tokens,)``, in the order of :class:`LastStates`."""
    parts = [batch["labels"][0, 1:] for batch in batches]
    return torch.cat([part[part != IGNORED] for part in parts])


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """fp32 where an adapter works on it; else as stored: the table of a large vocabulary is the largest tensor."""
    return None if type(module) in (nn.Linear, nn.Embedding) else torch.float32


_TOKENS = 64  # whose logits exist at a time: 64 x 128,256 x 4 bytes are 33 MB


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model against a reference, at the labelled tokens.

    Attributes:
        loss: Mean negative log-likelihood of the labels, in nats.
        kl: Mean Kullback-Leibler divergence of the model from the reference, in nats.
        largest_kl: The largest of a token.
        top1: Share of tokens at which both put the same token first.
        mean_difference: Mean absolute difference of logits.
        largest_difference: The largest.
    """

    loss: float
    kl: float
    largest_kl: float
    top1: float
    mean_difference: float
    largest_difference: float


class Reference:
    """The logits that others are compared with; they are kept.

    Args:
        states: The reference model.
        labels: ``(labelled tokens,)``.
    """

    def __init__(self, states: LastStates, labels: Tensor) -> None:
        self.labels = labels
        self.logits = torch.cat([states.logits(part) for part in _parts(len(labels))])
        rows = torch.arange(len(labels))
        self.loss = float(-self.logits.log_softmax(-1)[rows, labels].double().mean())

    def compare(self, states: LastStates) -> Comparison:
        """Compare another model's logits at the same tokens."""
        divergences, nll, same = [], [], []
        total, largest = 0.0, 0.0
        for part in _parts(len(self.labels)):
            own, other = self.logits[part], states.logits(part)
            log_p, log_q = own.log_softmax(-1), other.log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            nll.append(-log_q.gather(1, self.labels[part].unsqueeze(1))[:, 0])
            same.append(own.argmax(-1) == other.argmax(-1))
            apart = (own - other).abs()
            total, largest = total + float(apart.double().mean(-1).sum()), max(largest, float(apart.max()))
        kl = torch.cat(divergences).double().clamp_min(0)  # rounding may put it below
        return Comparison(
            loss=float(torch.cat(nll).double().mean()),
            kl=float(kl.mean()),
            largest_kl=float(kl.max()),
            top1=float(torch.cat(same).double().mean()),
            mean_difference=total / len(self.labels),
            largest_difference=largest,
        )


def _parts(count: int) -> list[slice]:
    return [slice(start, start + _TOKENS) for start in range(0, count, _TOKENS)]
