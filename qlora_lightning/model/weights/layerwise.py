"""Runs a model layer by layer, to compare two that do not fit into memory together."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_lightning.model.layers.attention import NO_MASK
from qlora_lightning.model.step.layout import IGNORED, whole_samples
from qlora_lightning.model.step.loss import head_of
from qlora_lightning.model.weights.base import Weights, holding_weights

_CPU = torch.device("cpu")
_HEAD_ROWS = 16_384  # of the head's weight that are turned into fp32 at a time
_TOKENS = 64  # whose logits exist at a time: 64 x 128,256 x 4 bytes are 33 MB


@torch.no_grad()
def run_layerwise(
    model: Any,
    weights: Weights,
    batches: Sequence[Mapping[str, Any]],
    advance: Callable[[], object] = lambda: None,
    device: torch.device = _CPU,
) -> Iterator[Tensor]:
    """Run flat batches through a hollow model in fp32, a layer in memory at a time.

    Args:
        model: Its layers lie on ``device`` afterwards, as far as they have numbers.
        weights: What it is filled with.
        batches: Flat batches on the CPU.
        advance: Called after each layer.
        device: Where layers compute; all else is on the CPU, the default.

    Yields:
        The logits ``(tokens, vocabulary)`` of the next labelled tokens, in the order of :func:`labels_of`.
    """
    inner, embedding, head = model.model, model.get_input_embeddings(), model.get_output_embeddings()
    ids, positions = (torch.cat([batch[name] for batch in batches], 1) for name in ("input_ids", "position_ids"))
    with holding_weights(embedding, "model.embed_tokens", weights, _dtype_of(embedding)):
        embedded = embedding(ids).float()
    for number, layer in enumerate(inner.layers):
        layer.forward = _filling(layer, f"model.layers.{number}", weights, batches, advance, device)
    try:
        with holding_weights(inner.norm, "model.norm", weights, torch.float32):
            output = inner(inputs_embeds=embedded, position_ids=positions, attention_mask=NO_MASK, use_cache=False)
    finally:
        for layer in inner.layers:
            del layer.forward
    states = torch.split(output.last_hidden_state[0], [batch["input_ids"].shape[1] for batch in batches])
    # (labelled tokens, width)
    labelled = torch.cat([each[_predicting(batch)] for each, batch in zip(states, batches, strict=True)])
    with holding_weights(head, "lm_head", weights, _dtype_of(head)):
        whole: Any = head_of(model)
        for some in torch.split(labelled, _TOKENS):
            if _dtype_of(head) is not None or head.bias is not None or whole is not head:
                yield whole(some.to(head.weight.dtype) if _dtype_of(head) is None else some).float()
            else:
                yield torch.cat([some @ rows.float().t() for rows in torch.split(head.weight, _HEAD_ROWS)], dim=-1)


def _filling(
    layer: nn.Module,
    name: str,
    weights: Weights,
    batches: Sequence[Mapping[str, Any]],
    advance: Callable[[], object],
    device: torch.device,
) -> Callable[..., Tensor]:
    """Return a layer's forward over all batches, one after the other, with weights that are dropped at its end."""
    ends = list(itertools.accumulate(batch["input_ids"].shape[1] for batch in batches))

    def cut(value: Any, start: int, end: int) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(each, start, end) for each in value)
        is_of_tokens = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == ends[-1]
        return (value[:, start:end] if is_of_tokens else value).to(device) if isinstance(value, Tensor) else value

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outputs = []
        with holding_weights(layer, name, weights, torch.float32):
            layer.to(device)
            for batch, start, end in zip(batches, [0, *ends], ends, strict=False):
                own_args = cut(args, start, end)
                own = {key: cut(value, start, end) for key, value in kwargs.items()}
                own["samples"] = whole_samples(batch["cu_seqlens"].diff().tolist()).to(device)
                outputs.append(type(layer).forward(layer, cut(hidden, start, end), *own_args, **own).cpu())
        advance()
        return torch.cat(outputs, 1)

    return forward


def labels_of(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the labels of batches, ``(labelled tokens,)``."""
    return torch.cat([batch["labels"][0, 1:][_predicting(batch)] for batch in batches])


def _predicting(batch: Mapping[str, Any]) -> Tensor:
    labelled: Tensor = batch["labels"][0, 1:] != IGNORED
    return labelled.nonzero()[:, 0]


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """fp32 where an adapter works on it; else as stored: the table of a large vocabulary is the largest tensor."""
    return None if type(module) in (nn.Linear, nn.Embedding) else torch.float32


class Agreement(NamedTuple):
    """How far a model agrees with a reference, at the labelled tokens.

    Attributes:
        loss: Mean negative log-likelihood of the labels, in nats.
        kl: Mean Kullback-Leibler divergence of the model from the reference, in nats.
        top1: Share of tokens at which both put the same token first.
    """

    loss: float
    kl: float
    top1: float


class Reference:
    """The logits that others are compared with, as :func:`run_layerwise` yields them; they are kept."""

    def __init__(self, logits: Iterable[Tensor], labels: Tensor) -> None:
        self.labels, self.logits = labels, torch.cat(list(logits))
        self.loss = float(-self.logits.log_softmax(-1)[torch.arange(len(labels)), labels].double().mean())

    def compare(self, logits: Iterable[Tensor]) -> Agreement:
        """Compare another model's logits at the same tokens."""
        parts = torch.split(self.logits, _TOKENS), logits, torch.split(self.labels, _TOKENS)
        rows = []  # of each token: negative log-likelihood, KL, same first token
        for own, other, labels in zip(*parts, strict=True):
            log_p, log_q = own.log_softmax(-1), other.log_softmax(-1)
            nll = -log_q.gather(1, labels.unsqueeze(1))[:, 0]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding may put it below
            same = own.argmax(-1) == other.argmax(-1)
            rows.append(torch.stack([each.double() for each in (nll, kl, same)]))
        return Agreement(*torch.cat(rows, dim=1).mean(1).tolist())
