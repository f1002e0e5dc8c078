"""Next-token loss on labeled tokens only; a packed batch's ``(tokens, vocabulary)`` logits never exist all at once."""
# mypy: allow-untyped-calls

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qlora_lightning.model.layers.elementwise import has_kernel
from qlora_lightning.model.layers.lora import device_of_autocast
from qlora_lightning.model.layers.select import has_hooks
from qlora_lightning.model.model_types import runs_packed
from qlora_lightning.support.errors import UserError

_MAX_LOGIT_ROWS = 512  # labeled tokens whose logits exist at a time: more make the head's product no faster
_LOGIT_BYTES = 64 << 20  # and these logits take no more than this: 261 rows of a vocabulary of 128,256 in bf16
_LOGIT_BYTES_OF_GPU = 128 << 20  # on a GPU: 512 such rows, whose products fill it


@dataclass(eq=False)
class LossSums:
    """Sums over the tokens of a micro-batch: they add up over micro-batches, steps and processes, as means would not.

    :meth:`of` makes them from the loss of each token. ``LossSums(nll.mean(), len(nll))`` would be wrong: the sum of all
    micro-batches is divided by their count later, so that mean would be divided twice.

    Attributes:
        loss_sum: The sum of the loss, by default of the negative log-likelihood in nats; a scalar with a gradient.
        count: How much was counted, a scalar: the mean loss is ``loss_sum / count``. It is a number of tokens or, with
            weighted tokens, the sum of their weights, which need not be a whole number. 0 means no gradient.
        metrics: More sums over the same tokens, by name. Their means are logged as ``train_NAME``, ``val_NAME`` and
            ``test_NAME``; that of ``nll``, the negative log-likelihood in nats, as a perplexity, which no other loss
            has. With several processes, each step of each has the same names.

    Raises:
        UserError: One of them is not a single number.
    """

    loss_sum: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.loss_sum.device if isinstance(self.loss_sum, Tensor) else torch.device("cpu")
        self.count = _as_scalar("count", self.count, device)
        self.loss_sum = _as_scalar("loss_sum", self.loss_sum, device)
        self.metrics = {name: _as_scalar(f"metrics.{name}", each, device) for name, each in self.metrics.items()}

    @classmethod
    def of(cls, losses: Tensor, **metrics: Tensor) -> Self:
        """Sum the loss of each token, or of each row, ``(n,)``, and metrics of the same tokens, ``(n,)`` each.

        Raises:
            UserError: One of them has another shape.
        """
        for name, values in {"losses": losses, **metrics}.items():
            if values.ndim != 1 or len(values) != len(losses):
                raise UserError(
                    f"LossSums.of got {name} of shape {tuple(values.shape)}: expected one number for each token that "
                    "is counted, a tensor of one dimension, of the same length for the losses and all metrics.",
                    "loss.shape",
                )
        sums = {name: values.detach().sum(dtype=torch.float32) for name, values in metrics.items()}
        # torch.tensor would wait for a GPU
        count = torch.full((), len(losses), device=losses.device)
        return cls(losses.sum(dtype=torch.float32), count, sums)

    def detach(self) -> "LossSums":
        """Return the same sums without their graph."""
        metrics = {name: value.detach() for name, value in self.metrics.items()}
        return LossSums(self.loss_sum.detach(), self.count.detach(), metrics)

    def by_name(self) -> dict[str, Tensor]:
        """Return the count as ``labelled_tokens``, the sum of the loss as ``loss``, and the metrics, by name.

        Raises:
            UserError: A metric has a name that is logged already.
        """
        if taken := _LOGGED_NAMES & self.metrics.keys():
            raise UserError(
                f"LossSums.metrics has {min(taken)}, which is logged already: choose another name.", "loss.metrics"
            )
        return {"labelled_tokens": self.count, "loss": self.loss_sum, **self.metrics}


_LOGGED_NAMES = {"labelled_tokens", "loss", "grad_norm", "perplexity"}


def _as_scalar(name: str, value: Any, device: torch.device) -> Tensor:
    """Return a number, or a scalar tensor, as a scalar tensor on a device, without waiting for a GPU."""
    scalar: Tensor = value if isinstance(value, Tensor) else torch.full((), value, device=device)
    if scalar.ndim:
        raise UserError(
            f"LossSums.{name} has the shape {tuple(scalar.shape)}: expected one number, a sum over the tokens. "
            "`LossSums.of(losses)` sums the loss of each token.",
            "loss.shape",
        )
    return scalar.to(device, non_blocking=True)


def divisor_of(count: Tensor) -> Tensor:
    """Return what a sum is divided by: its count or, if nothing was counted, infinity, for a mean of 0."""
    return torch.where(count == 0, torch.inf, count)


class TokenStatistics:
    """Add up :class:`LossSums` over batches and ranks, in float64: neither batch size nor order changes the result.

    Attributes:
        sums: The sums so far, by name.
        fault: Why some losses were not computed, so that there are no means; empty if all were.
        counted: What the last means were divided by.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.fault = ""
        self.counted = 0.0

    def update(self, sums: LossSums) -> None:
        """Add the sums of one batch."""
        for name, value in sums.by_name().items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def compute(self, over_ranks: bool = False) -> dict[str, Tensor]:
        """Return the means of all sums: of ``loss`` and of the ``metrics``."""
        sums = self.sums
        if over_ranks:
            gathered: list[dict[str, float]] = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(gathered, {name: float(value) for name, value in sums.items()})
            names = dict.fromkeys(name for rank_sums in gathered for name in rank_sums)
            sums = {
                name: torch.tensor(sum(each.get(name, 0.0) for each in gathered), dtype=torch.float64) for name in names
            }
        totals = torch.stack([*sums.values()])
        self.counted = float(totals[0])
        return dict(zip([*sums][1:], totals[1:] / divisor_of(totals[0]), strict=True))


def reject_uncounted(what: str) -> None:
    """Reject steps or rows of which nothing was counted: nothing would be learned, or measured."""
    raise UserError(
        f"{what} counted no token: the labels of their rows are all -100, as with a wrong mask of the answers, or "
        "compute_loss returned a count of 0.",
        "loss.nothing_counted",
    )


def logits_chunk_size(vocabulary: int, number_bytes: int, device: str) -> int:
    """Return the number of labeled tokens whose logits exist at a time."""
    most_bytes = _LOGIT_BYTES if device == "cpu" else _LOGIT_BYTES_OF_GPU
    return max(1, min(_MAX_LOGIT_ROWS, most_bytes // (vocabulary * number_bytes)))


def token_losses(hidden: Tensor, targets: Tensor, head: Any, *, fused: bool) -> tuple[Tensor, Tensor]:
    """Compute the loss of each labeled token, ``(K,)`` float32, and whether it is the most likely one, ``(K,)``.

    The logits of some tokens exist at a time: see :func:`logits_chunk_size`. ``hidden`` has the last states, after the
    final norm, ``(K, width)``; ``head`` is that of :func:`lm_head_of`. If ``fused``, a frozen head's gradient is
    computed with the logits, else by autograd.
    """
    if hasattr(head, "token_losses"):  # a sharded head, which is whole only inside its own forward
        return cast(tuple[Tensor, Tensor], head.token_losses(hidden, targets, fused))
    chunk_size = logits_chunk_size(len(head.weight), head.weight.element_size(), hidden.device.type)
    if fused and is_frozen_linear(head):
        nll, correct = _FrozenHeadLoss.apply(hidden, head.weight, targets, chunk_size)
        return nll, correct
    return _checkpointed_head_loss(hidden, head, targets, chunk_size)


def lm_head_of(causal_lm: Any) -> nn.Module:
    """Return the module that maps last hidden states to logits as the model's own forward does.

    Granite divides logits by a scale, Cohere, Falcon-H1 and HyperCLOVA X multiply them, Gemma 4 caps them.
    """
    if "sharded_head" in vars(causal_lm):
        return cast(nn.Module, causal_lm.sharded_head)
    config, linear = causal_lm.config, causal_lm.get_output_embeddings()
    if not runs_packed(config):
        return _Head(linear, lambda logits: logits)  # the model's own forward gave logits, a row at a time
    names = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    divisor, factor, softcap = (getattr(config, name, None) for name in names)
    factor = getattr(config, "lm_head_multiplier", factor)
    if config.model_type == "hyperclovax":  # its logits_scaling is a factor
        divisor, factor = None, divisor
    if divisor is None and factor is None and softcap is None:
        return cast(nn.Module, linear)

    def to_logits(hidden: Tensor) -> Tensor:
        logits: Tensor = linear(hidden) / (divisor or 1.0) * (factor or 1.0)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    return _Head(linear, to_logits)


class _Head(nn.Module):
    """Maps states to logits by a function; the linear's weight, ``(vocabulary, width)``, gives their size."""

    def __init__(self, linear: nn.Module, to_logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.to_logits = linear, to_logits

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.linear.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.to_logits(hidden)


def is_frozen_linear(head: Any) -> bool:
    """Whether a head is a frozen ``nn.Linear`` without bias and without hooks."""
    is_plain = type(head) is nn.Linear and not has_hooks(head)
    return is_plain and head.bias is None and not head.weight.requires_grad


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of a frozen linear head; the gradient of the hidden states is computed while the logits exist.

    d nll / d hidden = (softmax(logits) - onehot(target)) @ weight, so that backward only scales what forward saved.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden, dtype=weight.dtype) if ctx.needs_input_grad[0] else None
        nll, correct = hidden.new_empty(len(targets), dtype=torch.float32), torch.empty_like(targets, dtype=torch.bool)
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = hidden[chunk].to(weight.dtype) @ weight.t()  # later overwritten by their gradient
            nll[chunk], correct[chunk] = cross_entropy(logits, targets[chunk], grad_hidden is not None)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
            del logits  # before the next chunk's exist
        ctx.save_for_backward(grad_hidden)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        if grad_hidden is not None:  # the factors are float32, and the product is rounded once
            grad_hidden = torch.mul(grad_hidden, grad_nll[:, None], out=torch.empty_like(grad_hidden, dtype=ctx.dtype))
        return grad_hidden, None, None, None


@has_kernel
def cross_entropy(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Compute negative log-likelihoods, and whether targets are the most likely tokens.

    If ``with_gradient``, the gradient overwrites the logits.
    """
    target, probabilities = targets[:, None], torch.softmax(logits, -1, dtype=torch.float32)  # (rows, vocabulary)
    prediction = probabilities.argmax(-1, keepdim=True)  # the first of the largest
    # log p(target) = log p(prediction) + logit(target) - logit(prediction): p(target) may underflow
    margin = logits.gather(1, prediction).float() - logits.gather(1, target).float()
    nll, correct = margin - probabilities.gather(1, prediction).log_(), prediction == target
    if with_gradient:
        logits.copy_(probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32)))
    return nll.flatten(), correct.flatten()


def _checkpointed_head_loss(hidden: Tensor, head: nn.Module, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Compute the same by autograd, which recomputes the logits: for a head that trains, and on the plain path."""

    def losses(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # a head that trains is in float32, and multiplied in the dtype of the states
        with torch.autocast(device_of_autocast(hidden), hidden.dtype, enabled=hidden.dtype.itemsize == 2):
            logits = head(hidden).float()
        return F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target

    chunks = [
        checkpoint(losses, hidden[start : start + size], targets[start : start + size], use_reentrant=False)
        for start in range(0, len(targets), size)
    ]
    if not chunks:  # keeps the graph connected if nothing is labeled
        return hidden.sum(-1).float() * 0.0, torch.zeros_like(targets, dtype=torch.bool)
    nll, correct = map(torch.cat, zip(*chunks, strict=True))
    return nll, correct
