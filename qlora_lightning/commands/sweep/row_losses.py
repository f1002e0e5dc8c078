"""The loss of each validation row, so that two trials can be compared row by row."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lightning.evaluation.judge import losses_of_rows
from qlora_lightning.model.batch import cut_into_rows
from qlora_lightning.support.errors import UserError


@dataclass(frozen=True)
class RowLosses:
    """Of all validation rows, in their order.

    Attributes:
        nll: Summed negative log-likelihood of each row's labelled tokens, in nats.
        tokens: Labelled tokens of each row.
    """

    nll: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """The mean over all labelled tokens, in nats."""
        return sum(self.nll) / max(1, sum(self.tokens))


def judge_rows(module: Any, batches: Iterable[Any], move: Any = lambda batch: batch) -> RowLosses:
    """Compute the loss of each row alone, by the module's own ``compute_loss``, without gradients.

    Args:
        module: A :class:`QLoRAModule`; it is left in the mode in which it was.
        batches: Flat batches of our data module.
        move: Puts a batch on the module's device.

    Raises:
        UserError: A batch is not flat, so that its rows cannot be told apart.
    """
    nll: list[float] = []
    tokens: list[int] = []
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                rows = cut_into_rows(batch)
                if not rows:
                    raise UserError(
                        "A sweep compares validation rows one by one, and the validation loader gives batches of "
                        "another make than InstructionDataModule's: they cannot be cut into rows."
                    )
                for sums in losses_of_rows(module, [move(row) for row in rows]):
                    if int(sums.labelled_tokens):  # a filler has none
                        nll.append(float(sums.nll_sum))
                        tokens.append(int(sums.labelled_tokens))
    finally:
        module.train(was_training)
    return RowLosses(nll, tokens)
