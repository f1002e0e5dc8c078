"""From batches to the gradients of an optimizer step: the window, and passes that fit into memory.

Each micro-batch gives the gradient of a *sum* of losses. At the end of the window the gradients are divided by its
labeled tokens over all ranks: every token weighs the same, however the rows were cut into micro-batches and ranks.
"""
# mypy: allow-untyped-calls

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qlora_lightning.model.step.loss import LossSums, divisor_of
from qlora_lightning.model.step.packed import Cutter, is_packed
from qlora_lightning.support.errors import UserError, is_out_of_memory, reason_of
from qlora_lightning.support.trainer import say_once

Result = TypeVar("Result")


class OutOfMemory(Exception):
    """Memory ran out in a part of a batch, which was one micro-batch, for a reason."""

    def __init__(self, part: Mapping[str, Any], reason: str) -> None:
        super().__init__(reason)
        self.part, self.reason = part, reason


class LossScale:
    """The factor of the loss in backward, divided out before a step: in fp16 small gradients would vanish.

    The gradient of a sum over tokens is large already: 32 is enough to begin with. If the gradient of a step is not
    finite, that step is skipped and the factor halved; after many finite steps it is doubled again. So does torch's
    GradScaler, but reading its factor is another wait for the GPU, and it takes the step, which here Lightning takes.

    Attributes:
        is_used: Whether products are in fp16; else the factor is 1, and no step is skipped.
    """

    _FIRST, _LOWEST = 32.0, 1 / 32
    _FINITE_STEPS = 2000  # in a row, until it is doubled: GradScaler's growth_interval
    _MOST_SKIPPED = 10  # in a row

    def __init__(self) -> None:
        self.is_used = self._is_told = False
        self._state = {"value": self._FIRST, "finite": 0, "skipped": 0}  # the last two are steps in a row

    @property
    def value(self) -> float:
        """The current factor."""
        return self._state["value"] if self.is_used else 1.0

    def skips_step(self, step: int, is_finite: bool) -> bool:
        """Count a step by its gradient; return whether it is skipped, which too many in a row are not. Say so once."""
        value, finite, skipped = self._state.values()
        if is_finite:
            finite, skipped = finite + 1, 0
            if finite == self._FINITE_STEPS:
                value, finite = min(2 * value, self._FIRST), 0
        else:
            value, finite, skipped = max(value / 2, self._LOWEST), 0, skipped + 1
        self._state = {"value": value, "finite": finite, "skipped": skipped}
        is_skipped = self.is_used and 0 < skipped < self._MOST_SKIPPED
        if is_skipped and not self._is_told:
            say_once(
                f"The gradient of step {step} is NaN or infinite in fp16: the step is skipped, and loss_scale is "
                f"{value:g} from now on. Later steps are skipped without a message; {self._MOST_SKIPPED} in a row stop "
                "the run."
            )
            self._is_told = True
        return is_skipped

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run restores."""
        return self._state

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what a run had found."""
        self._state = {name: state[name] for name in self._state}


class Window(Callback):
    """The batches of one optimizer step: the gradients of their sums, and the sums.

    The module adds it in ``configure_callbacks``.

    Attributes:
        batches: The batches of this process in the open window.
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
        self.batches: list[Any] = []
        self.counts: dict[str, float] = {"tokens": 0}
        self._clear_sums()

    def _clear_sums(self) -> None:
        self._sums: dict[str, Tensor] = {}  # labelled_tokens, loss, and LossSums.metrics
        self.micro_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clear()  # Lightning skips on_train_epoch_start if it resumes inside an epoch
        if isinstance(model := trainer.strategy.model, DistributedDataParallel):
            # the window reduces gradients, once a step and in one tensor: DDP does in each backward, of which processes
            # may have different numbers, and sorts its buckets again after the first, so that a resume would round
            # differently
            model.require_backward_grad_sync = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clear()  # an epoch, a failed fit, or a search for a learning rate may have ended inside a window

    @property
    def row_ids(self) -> list[int]:
        """The ids of the rows of its batches; a batch of another kind may have none."""
        batches = [batch for batch in self.batches if isinstance(batch, Mapping) and batch.get("row_ids") is not None]
        return [row_id for batch in batches for row_id in batch["row_ids"].tolist()]

    def accumulate(
        self, batch: Any, cutter: Cutter, backpropagate: Callable[[Any], LossSums], zero_grad: Callable[[], None]
    ) -> Tensor:
        """Add the gradients of a batch's sums to those of the window; return the batch's mean loss.

        ``backpropagate`` computes those of one micro-batch, and returns its sums. If memory runs out, the whole window
        is computed again in smaller parts.
        """
        if not self.batches:
            zero_grad()
        self.batches.append(batch)
        if isinstance(batch, Mapping) and "input_ids" in batch:
            self.counts["tokens"] += batch["input_ids"].numel()

        def start_over() -> list[Any]:
            zero_grad()
            self._clear_sums()
            return self.batches

        *earlier, sums = run_passes([batch], cutter, backpropagate, start_over)
        for each in (*earlier, sums):
            self._add(each)
        count = torch.stack([each.count for each in sums]).sum()
        return torch.stack([each.loss_sum for each in sums]).sum() / divisor_of(count)

    def _add(self, batch_sums: list[LossSums]) -> None:
        for sums in batch_sums:
            for name, value in sums.by_name().items():
                self._sums[name] = value.double() + self._sums.get(name, 0)
        self.micro_batches += len(batch_sums)

    # ---- votes: yes or no of each rank, which travel with the gradients ----------------------------------------------

    def vote(self, question: str, answer: bool) -> None:
        """Answer a question for this rank, by ``on_after_backward`` at the latest."""
        self.counts[question] = float(answer)

    def any_voted(self, question: str) -> bool:
        """Whether any rank has answered yes before the last optimizer step."""
        return self.totals[question] > 0

    # ---- the end of the window ---------------------------------------------------------------------------------------

    def divide_gradients(
        self, parameters: Iterable[nn.Parameter], factor: float, *, over_ranks: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Turn accumulated gradients into those of the window's mean loss; return what is logged, and ``totals``.

        Logged are ``loss``, ``grad_norm`` (before clipping) and the means of ``LossSums.metrics``. ``factor`` undoes a
        scale of the gradients; ``over_ranks`` means that they and all sums are added up over several ranks.
        """
        if over_ranks:  # every rank has gradients of the same parameters, even if only one has used them
            parameters = [param for param in parameters if param.requires_grad]
            for param in parameters:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
            self._check_names()
        grads = [param.grad for param in parameters if param.grad is not None]
        losses = torch.stack([*self._sums.values()])
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float64)
        sums = torch.cat([losses, counts.to(losses.device, non_blocking=True)])  # reduced at once
        if over_ranks:  # Lightning's ``reduce`` would put a barrier before each sum
            torch.distributed.all_reduce(sums)
            all_grads = torch.cat([grad.reshape(-1) for grad in grads])
            torch.distributed.all_reduce(all_grads)
            slices = torch.split(all_grads, [grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [reduced.view_as(grad) for reduced, grad in zip(slices, grads, strict=True)])
        divisor = divisor_of(sums[0])  # a window that counts nothing has no gradient
        if grads:
            torch._foreach_mul_(grads, (factor / divisor).float())
        losses, counts = sums.split([len(self._sums), len(self.counts)])
        means = dict(zip(self._sums, (losses / divisor).float(), strict=True))
        del means["labelled_tokens"]
        totals = {"labelled_tokens": sums[0], **dict(zip(self.counts, counts, strict=True))}
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
                f"LossSums.metrics has the names {', '.join(names)} here, and {', '.join(other[0])} in another process "
                "or an earlier step: with several processes return the same ones each time, 0 for none.",
                "loss.metrics",
            )


def to_host(means: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Copy means and totals to the host at once.

    In a step of a dense base in 4 bits the host waits for a GPU only here; a mixture makes it wait in each layer too,
    and int8 in each linear.
    """
    values = torch.stack([value.detach().double() for value in (*means.values(), *totals.values())]).cpu()
    host_means = {name: value.float() for name, value in zip(means, values, strict=False)}
    return host_means, dict(zip(totals, values[len(means) :].tolist(), strict=True))


def evaluate(batch: Any, cutter: Cutter, compute: Callable[[Any], Result]) -> list[Result]:
    """Compute, without gradients, a function of each micro-batch of a batch."""
    (results,) = run_passes([batch], cutter, compute, lambda: [batch])
    return results


def run_passes(
    batches: Sequence[Any], cutter: Cutter, function: Callable[[Any], Result], start_over: Callable[[], Sequence[Any]]
) -> list[list[Result]]:
    """Return a function's results of the micro-batches of each batch; if memory runs out, of smaller ones.

    ``start_over`` undoes then what the passes have done, and returns the batches to compute.
    """
    while True:
        try:
            return [[_run_pass(part, cutter, function) for part in cutter.cut(batch)] for batch in batches]
        except OutOfMemory as error:
            shortage = error.with_traceback(None)
        cutter.budget.lower(shortage, cutter)
        batches = start_over()


def _run_pass(part: Any, cutter: Cutter, function: Callable[[Any], Result]) -> Result:
    """Return the function's result of a part of a batch, which it gets as a micro-batch on the device.

    Raises:
        OutOfMemory: Memory ran out in it. A batch of another kind cannot be cut: its error is the library's.
    """
    if not is_packed(part):
        return function(part)
    try:
        result = function(cutter.lay_out(part))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason, error.__traceback__ = reason_of(error), None  # its frames hold the activations
    else:
        cutter.budget.record(part)
        return result
    raise OutOfMemory(part, reason)  # not in the handler, whose error it would keep
