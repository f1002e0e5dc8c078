"""The micro-batches of one optimizer step: their sums, and the gradient of their mean over all ranks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qlora_lightning.model.step.loss import LossSums


class Window:
    """Adds up what the micro-batches of one optimizer step have counted.

    Each micro-batch gives the gradient of a *sum* of losses. At the end of the window the gradients are divided by the
    labelled tokens of the whole window over all ranks, so that every token weighs the same, however the rows were cut
    into micro-batches and ranks.

    Attributes:
        batches: Of this process in the open window.
        row_ids: Their rows.
        counts: Numbers of this process, by name, which are added up over all ranks together with the gradients: the
            window's ``tokens``, and what callbacks put in before a step.
        totals: Of the last step, over all ranks: ``counts``, and ``labelled_tokens``.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.batches: list[Any] = []
        self.counts: dict[str, float] = {"tokens": 0}
        self.clear_sums()

    def clear_sums(self) -> None:
        """Forget what was counted, to run the window's batches again."""
        self.nll_sum: Tensor | None = None
        self.labelled_tokens: Tensor | None = None
        self.logged: dict[str, Tensor] = {}  # see LossSums
        self.micro_batches = 0
        self.row_ids: list[int] = []

    def open_batch(self, batch: Any, most: int) -> None:
        """Take a batch of the window, which has at most so many."""
        if len(self.batches) >= most:
            raise RuntimeError(
                "The last optimizer step left the gradients of a sum undivided: a subclass overrides "
                "`on_before_optimizer_step` without calling `super().on_before_optimizer_step(optimizer)`."
            )
        self.batches.append(batch)
        if "input_ids" in batch:
            self.counts["tokens"] += batch["input_ids"].numel()

    def add(self, sums: LossSums, row_ids: Sequence[int] = ()) -> None:
        """Count one micro-batch."""
        self.micro_batches += 1
        nll_sum = sums.nll_sum.detach()
        self.nll_sum = nll_sum if self.nll_sum is None else self.nll_sum + nll_sum
        tokens = sums.labelled_tokens
        self.labelled_tokens = tokens if self.labelled_tokens is None else self.labelled_tokens + tokens
        for name, each in sums.logged.items():
            self.logged[name] = each.detach() + self.logged.get(name, 0.0)
        self.row_ids += row_ids

    @staticmethod
    def replace_ddp_reduction(model: nn.Module | None) -> None:
        """Keep DDP, if it wraps a model, from adding up gradients: :meth:`divide_gradients` does, once a step.

        DDP adds up what one backward gives, and each process may have another number of them. It puts gradients into
        buckets, and orders them again after the first backward. The place of a number decides in which order three or
        more ranks are added up, and so its last bit: a resumed run would be rounded otherwise than one that was never
        stopped. In one flat tensor the order is always the same.
        """
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = False

    def divide_gradients(
        self, parameters: Iterable[nn.Parameter], factor: float, *, over_ranks: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Turn accumulated gradients into those of the window's mean loss; return what is logged, and ``totals``.

        Logged are ``loss``, ``grad_norm`` (before clipping) and the means of ``LossSums.logged``.

        ``factor`` undoes a scale that they have; ``over_ranks`` says that there are several ranks, over
        which all is summed up.
        """
        if self.nll_sum is None or self.labelled_tokens is None:
            raise RuntimeError("An optimizer step without a micro-batch: call compute_loss in training_step.")
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64).to(self.nll_sum.device)
        sums = torch.stack([each.double() for each in (self.labelled_tokens, self.nll_sum, *self.logged.values())])
        sums = torch.cat([sums, counts])
        if over_ranks:  # Lightning's ``reduce`` would put a barrier before each sum
            torch.distributed.all_reduce(sums)
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            torch.distributed.all_reduce(flat)
            pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
        tokens = sums[0].clamp(min=1.0)  # a window without labels has gradients of zero
        if gradients:
            torch._foreach_mul_(gradients, (factor / tokens).float())
        means = dict(zip(("loss", *self.logged), (sums[1:] / tokens).float(), strict=False))
        totals = {"labelled_tokens": sums[0], **dict(zip(self.counts, sums[-len(counts) :], strict=True))}
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(means["loss"])
        return {**means, "grad_norm": norm}, totals
