"""Loss, perplexity and token accuracy of a pass over data, weighted by tokens."""

import torch
from torch import Tensor
from torchmetrics import Metric

from qlora_lightning.model.loss import LossSums


class TokenStatistics(Metric):
    """Add up :class:`LossSums` over batches and ranks, so that neither batch size nor order changes the result.

    ``compute`` gives ``loss`` (nats per labelled token), ``perplexity`` (its exponential) and ``token_accuracy``
    (share of labelled tokens that were the most likely one).
    """

    full_state_update = False
    nll_sum: Tensor
    labelled_tokens: Tensor
    correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64: a sum over millions of tokens must not depend on the order in which batches come
        self.add_state("nll_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("labelled_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, sums: LossSums) -> None:
        """Add the sums of one batch."""
        self.nll_sum += sums.nll_sum.detach()
        self.labelled_tokens += sums.labelled_tokens
        self.correct += sums.correct

    def compute(self) -> dict[str, Tensor]:
        """Give the means over all that was added; NaN where nothing was."""
        loss = self.nll_sum / self.labelled_tokens
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self.correct / self.labelled_tokens}
