"""The micro-batches of one optimizer step: their sums, and the gradient of their mean over all ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.model.step.loss import LossSums, sums_by_name
from qlora_lightning.model.step.micro_batch import compute_within_memory, run_micro_batches
from qlora_lightning.support.errors import UserError


class Window:
    """Computes the gradients of the batches of one optimizer step, and adds up the sums of their micro-batches.

    Each micro-batch gives the gradient of a *sum* of losses. At the end of the window the gradients are divided by the
    labelled tokens of the whole window over all ranks, so that every token weighs the same, however the rows were cut
    into micro-batches and ranks.

    Attributes:
        batches: The batches of this process in the open window.
        row_ids: Their rows.
        micro_batches: Number of their micro-batches.
        counts: Numbers of this process, by name, which are added up over all ranks together with the gradients:
            ``tokens``, and votes.
        totals: ``counts`` and ``labelled_tokens`` of the last step, over all ranks.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._names: list[list[str]] = []  # of the sums in the first step, by rank
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.batches: list[dict[str, Any]] = []
        self.counts: dict[str, float] = {"tokens": 0}
        self._clear_sums()

    def _clear_sums(self) -> None:
        self._sums: dict[str, Tensor] = {}  # labelled_tokens, loss, and LossSums.logged
        self.micro_batches = 0
        self.row_ids: list[int] = []

    def vote(self, question: str, answer: bool) -> None:
        """Answer a question for this rank, by ``on_after_backward`` at the latest: answers travel with gradients."""
        self.counts[question] = float(answer)

    def any_voted(self, question: str) -> bool:
        """Whether any rank has answered yes before the last optimizer step."""
        return self.totals[question] > 0

    def take(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Compute the gradients of a batch's sums, and return its mean loss.

        If memory runs out, the whole window is computed again in smaller parts.
        """
        if not self.batches:
            module.zero_grad(set_to_none=True)
        self.batches.append(batch)
        if "input_ids" in batch:
            self.counts["tokens"] += batch["input_ids"].numel()

        def replay() -> Tensor:
            module.zero_grad(set_to_none=True)
            self._clear_sums()
            return [self._compute(module, batch) for batch in self.batches][-1]

        mean: Tensor = compute_within_memory(module, batch, lambda: self._compute(module, batch), replay)
        return mean

    def _compute(self, module: Any, batch: dict[str, Any]) -> Tensor:
        """Compute and add up the gradients of a batch; return its mean loss."""
        nll_sum, labelled_tokens = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for part in run_micro_batches(module, batch):
            sums = _backpropagate(module, part)
            nll_sum, labelled_tokens = nll_sum + sums.nll_sum, labelled_tokens + sums.labelled_tokens
            for name, value in sums_by_name(sums).items():
                self._sums[name] = value + self._sums.get(name, 0)
            self.micro_batches += 1
            self.row_ids += part["layout"].rows if "layout" in part else part.get("row_ids", torch.empty(0)).tolist()
        return nll_sum / labelled_tokens.clamp(min=1)

    def divide_gradients(
        self, parameters: Iterable[nn.Parameter], factor: float, *, over_ranks: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Turn accumulated gradients into those of the window's mean loss; return what is logged, and ``totals``.

        Logged are ``loss``, ``grad_norm`` (before clipping) and the means of ``LossSums.logged``. ``factor`` undoes a
        scale of the gradients; ``over_ranks`` means that they and all sums are added up over several ranks.
        """
        if over_ranks:  # every rank has gradients of the same parameters, even if only one has used them
            parameters = list(parameters)
            for param in parameters:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
            self._check_names()
        grads = [param.grad for param in parameters if param.grad is not None]
        sums = torch.stack([value.double() for value in self._sums.values()])
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64)
        sums = torch.cat([sums, counts.to(sums.device, non_blocking=True)])
        if over_ranks:  # Lightning's ``reduce`` would put a barrier before each sum
            torch.distributed.all_reduce(sums)
            flat_grad = torch.cat([grad.reshape(-1) for grad in grads])
            torch.distributed.all_reduce(flat_grad)
            slices = torch.split(flat_grad, [grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [reduced.view_as(grad) for reduced, grad in zip(slices, grads, strict=True)])
        tokens = sums[0].clamp(min=1.0)  # a window without labels has gradients of zero
        if grads:
            torch._foreach_mul_(grads, (factor / tokens).float())
        means = dict(zip([*self._sums][1:], (sums[1:] / tokens).float(), strict=False))
        totals = {"labelled_tokens": sums[0], **dict(zip(self.counts, sums[len(self._sums) :], strict=True))}
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros_like(means["loss"])
        return {**means, "grad_norm": norm}, totals

    def _check_names(self) -> None:
        """Reject sums with other names than on other ranks, or than before: they would be added up as one another."""
        names = [*self._sums]
        if not self._names:  # the first step: all ranks are here
            self._names = [names] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(self._names, names)
        if other := [rank_names for rank_names in self._names if rank_names != names]:
            raise UserError(
                f"LossSums.logged has the names {', '.join(names)} here, and {', '.join(other[0])} in another process "
                "or an earlier step: with several processes return the same ones each time, 0 for none."
            )


def _backpropagate(module: Any, part: dict[str, Any]) -> LossSums:
    """Compute the gradients of a micro-batch; return its sums without their graph, which has casts of the adapters."""
    sums: LossSums = module.compute_loss(part)
    (sums.nll_sum * module.loss_scale).backward()
    logged = {name: value.detach() for name, value in sums.logged.items()}
    return sums._replace(nll_sum=sums.nll_sum.detach(), logged=logged)
