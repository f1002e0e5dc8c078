"""The micro-batches of one optimizer step: their sums, and the gradient of their mean over all ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.checkpoint.ranks import capture_generators, restore_generators
from qlora_lightning.model.loss import LossSums


class Window:
    """Adds up what the micro-batches of one optimizer step have counted.

    Each micro-batch gives the gradient of a *sum* of losses. At the end of the window the gradients are divided by the
    labelled tokens of the whole window over all ranks, so that every token weighs the same, however the rows were cut
    into micro-batches and ranks. A mean of means would weigh tokens of short micro-batches more.

    Attributes:
        row_ids: Of this process in the open window.
        closed_row_ids: Of this process in the window before it.
    """

    def __init__(self) -> None:
        self.row_ids: list[int] = []
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.closed_row_ids = self.row_ids
        self.nll_sum: Tensor | None = None
        self.labelled_tokens: Tensor | None = None
        self.micro_batches = 0
        self.row_ids = []
        self.batches: list[Any] = []  # to run again what was not finite; token ids take little
        self.losses: list[Tensor] = []
        self.labelled_tokens_of_all_ranks: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether a micro-batch has been added since the last optimizer step."""
        return self.micro_batches > 0

    def add(self, sums: LossSums, most: int, row_ids: Sequence[int] = (), batch: Any = None) -> None:
        """Count one micro-batch.

        Args:
            sums: What the micro-batch counted.
            most: Micro-batches that a window has at most.
            row_ids: Which rows it held.
            batch: The micro-batch itself, kept until the window is closed.

        Raises:
            RuntimeError: The last window was never closed, so its gradients are sums still.
        """
        if self.micro_batches >= most:
            raise RuntimeError(
                "The last optimizer step left the gradients of a sum undivided: a subclass overrides "
                "`on_before_optimizer_step` without calling `super().on_before_optimizer_step(optimizer)`."
            )
        self.micro_batches += 1
        nll_sum = sums.nll_sum.detach()
        self.nll_sum = nll_sum if self.nll_sum is None else self.nll_sum + nll_sum
        tokens = sums.labelled_tokens
        self.labelled_tokens = tokens if self.labelled_tokens is None else self.labelled_tokens + tokens
        self.row_ids += row_ids
        if batch is not None:
            self.batches.append(batch)
            self.losses.append(nll_sum)

    def divide_gradients(
        self, parameters: Iterable[nn.Parameter], divided_by: int, reduce_sum: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Turn accumulated gradients into those of the window's mean loss, and return that loss.

        Args:
            parameters: What trains.
            divided_by: What Lightning (accumulation) and DDP (ranks) have divided the gradients by already.
            reduce_sum: Sums a tensor over all ranks.
        """
        if self.nll_sum is None or self.labelled_tokens is None:
            raise RuntimeError("An optimizer step without a micro-batch: call compute_loss in training_step.")
        sums = reduce_sum(torch.stack([self.nll_sum.double(), self.labelled_tokens.double()]))
        self.labelled_tokens_of_all_ranks = sums[1]
        tokens = sums[1].clamp(min=1.0)  # a window without labels has gradients of zero
        factor = divided_by / tokens
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for dtype, gradients in by_dtype.items():
            torch._foreach_mul_(gradients, factor.to(dtype))
        return (sums[0] / tokens).float()

    def state_dict(self, trainable: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """Take down an open window with its gradients, to go on inside it."""
        if not self.is_open:
            return {}
        return {
            "micro_batches": self.micro_batches,
            "nll_sum": self.nll_sum,
            "labelled_tokens": self.labelled_tokens,
            "row_ids": list(self.row_ids),
            "gradients": {name: p.grad.clone() for name, p in trainable.items() if p.grad is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any], trainable: Mapping[str, nn.Parameter]) -> None:
        """Go on inside the window that :meth:`state_dict` took down."""
        self.clear()
        if not state:
            return
        self.nll_sum, self.labelled_tokens = state["nll_sum"], state["labelled_tokens"]
        self.micro_batches, self.row_ids = state["micro_batches"], list(state["row_ids"])
        for name, gradient in state["gradients"].items():
            parameter = trainable[name]
            parameter.grad = gradient.to(parameter.device).clone()


_FEWEST = 3  # ranks: a sum of two numbers has only one order


class GradientBuckets(Callback):
    """Let DDP settle how it lays gradients into buckets before the first step counts.

    After the first backward DDP lays them out anew, in the order in which they became ready. Where a number lies in a
    bucket decides in which order three or more ranks are added up, and so its last bit: the first step after a resume
    would be rounded otherwise than the same step of a run that was never stopped. So the first batch after a start is
    run twice before it counts. The module brings this along by ``configure_callbacks``.
    """

    def __init__(self) -> None:
        self._settled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settled = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ddp = trainer.strategy.model
        if self._settled or not isinstance(ddp, DistributedDataParallel) or trainer.world_size < _FEWEST:
            return
        self._settled = True
        module: Any = pl_module
        generators, trainable = capture_generators(), trainable_tensors(module)
        gradients = {name: parameter.grad for name, parameter in trainable.items()}  # of a window that is gone on with
        _set_gradients(trainable, dict.fromkeys(trainable))
        module.forward = lambda batch: module.compute_loss(batch).nll_sum
        try:
            # The second forward takes the layout that the first backward has found.
            for _ in range(2):
                with trainer.precision_plugin.train_step_context():
                    ddp(batch).backward()
        finally:
            del module.forward
            _set_gradients(trainable, gradients)
            restore_generators(generators)


def _set_gradients(trainable: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor | None]) -> None:
    for name, parameter in trainable.items():
        parameter.grad = gradients[name]
