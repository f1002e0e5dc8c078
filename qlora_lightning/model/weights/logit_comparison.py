"""How far the logits of one model lie from those of another."""

import dataclasses

import torch
from torch import Tensor

from qlora_lightning.model.weights.layerwise import Judged

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
        judged: The reference model.
        labels: ``(labelled tokens,)``.
    """

    def __init__(self, judged: Judged, labels: Tensor) -> None:
        self.labels = labels
        self.logits = torch.cat([judged.logits(part) for part in _parts(len(labels))])
        rows = torch.arange(len(labels))
        self.loss = float(-self.logits.log_softmax(-1)[rows, labels].double().mean())

    def compare(self, judged: Judged) -> Comparison:
        """Compare another model's logits at the same tokens."""
        divergences, nll, same = [], [], []
        total, largest = 0.0, 0.0
        for part in _parts(len(self.labels)):
            own, other = self.logits[part], judged.logits(part)
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
