"""Training on single answers with a verdict, desirable or not (Ethayarajh et al. 2024, KTO)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lightning.model.preferences import Objective, PreferenceModule, n_answers_of
from qlora_lightning.model.step.accumulate import evaluate
from qlora_lightning.model.step.layout import MicroBatch
from qlora_lightning.model.step.loss import LossSums
from qlora_lightning.model.step.packed import samples_of
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.errors import UserError, check_setting
from qlora_lightning.support.trainer import datamodule_of, trainer_of


class KTOModule(PreferenceModule):
    """A :class:`PreferenceModule` with the objective ``kto``, which makes one."""

    logged = ("reward_accuracy", "margin", "kl")
    accuracy = "reward_accuracy"

    def __init__(self, base: str, objective: Objective = "kto", **kwargs: Any) -> None:
        check_setting("model.objective", objective, objective == "kto", f"kto, which {type(self).__name__} has alone")
        super().__init__(base, objective, **kwargs)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # None with tokens_per_batch, which may hold one row
        size = getattr(datamodule_of(self.trainer), "batch_size", 2)
        is_valid = stage != "fit" or (size is not None and size > 1)
        check_setting("data.batch_size", size, is_valid, "2 or more: kto takes the answers of a batch's other rows")

    def compute_loss(self, batch: Any) -> LossSums:
        """Sum ``1 - σ(± (β log-ratio - β KL))`` of each answer (Ethayarajh et al., equation 8), and rows.

        The loss has the value without weights, and the gradient with them.
        """
        micro_batch = self.micro_batch_of(self.prepare_batch(batch))
        if micro_batch.desirable is None or micro_batch.kl is None:
            raise UserError(
                "model.objective kto learns from answers with a verdict, which the rows of data are not.",
                "model.objective",
            )
        n_answers = n_answers_of(micro_batch)
        ratios = (self.log_probs(micro_batch) - self.reference_log_probs(micro_batch))[:n_answers]
        desirable, kl = micro_batch.desirable[:n_answers], micro_batch.kl
        margins = self.beta * (ratios - kl) * torch.where(desirable, 1.0, -1.0)
        desirable_weight, other_weight = self._weights() if self.training else (1.0, 1.0)
        losses = torch.sigmoid(-margins)
        weighted = torch.where(desirable, desirable_weight, other_weight) * losses
        losses = losses.detach() + (weighted - weighted.detach())
        return self.sum_rows(losses, margins > 0, margins, kl.expand(n_answers))

    def _weights(self) -> tuple[float, float]:
        """Return the weights of desirable and other rows: the rarer kind in training weighs more, in proportion."""
        data = datamodule_of(trainer_of(self))
        samples = samples_of(data, "train")
        if samples is None or samples.desirable is None:
            return 1.0, 1.0
        verdicts, occurrences = np.asarray(samples.desirable), np.ones(len(samples.desirable))
        if (shares := getattr(data, "shares", None)) is not None:  # how often an epoch has each row
            in_epoch = np.array(shares) / np.sum(shares) * len(verdicts)
            occurrences = (in_epoch / np.bincount(samples.source))[samples.source]
        n_desirable, n_other = float(occurrences[verdicts].sum()), float(occurrences[~verdicts].sum())
        return max(1.0, n_other / max(n_desirable, 1)), max(1.0, n_desirable / max(n_other, 1))

    # ---- the divergence from the reference, of a whole batch however it is cut ---------------------------------------

    def prepare_batch(self, batch: Any) -> Any:
        lacks_kl = isinstance(batch, Mapping) and "desirable" in batch and "kl" not in batch
        return {**batch, "kl": self._estimate_kl(batch)} if lacks_kl else batch

    def _estimate_kl(self, batch: Mapping[str, Any]) -> Tensor:
        """Estimate the divergence: the mean log-ratio of mismatched answers, at least 0.

        A single row, as in an evaluation, has no mismatched answer: 0.
        """
        nothing = torch.zeros((), device=self.device)
        if len(batch["cu_seqlens"]) == 2 and self.sharded_base is None:  # else other ranks wait in their passes
            return nothing

        def ratios(micro_batch: MicroBatch) -> tuple[Tensor, int]:
            log_ratios = self.log_probs(micro_batch) - self.reference_log_probs(micro_batch)
            return log_ratios.sum(), sum(map(bool, micro_batch.counts))

        with torch.no_grad():
            sums, counts = zip(*evaluate(mismatch_answers(batch), self.cutter, ratios), strict=True)
        return (sum(sums, nothing) / sum(counts)).clamp(min=0) if sum(counts) > 1 else nothing


def mismatch_answers(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Make a packed batch, on the host, of each prompt with the previous row's answer, the first with the last's.

    An answer begins at the first labelled token, and is cut so that no row is longer than the longest of the batch.
    """
    lengths = batch["cu_seqlens"].diff().tolist()
    stacked = torch.stack([batch["input_ids"][0], batch["labels"][0]]).cpu()
    rows = torch.split(stacked, lengths, dim=1)  # (2, tokens) each
    starts = [next((n for n, label in enumerate(row[1].tolist()) if label != IGNORED), row.shape[1]) for row in rows]
    mismatched = []
    for n, row in enumerate(rows):  # for the first row, rows[n - 1] is the last
        prompt, answer = row[:, : starts[n]], rows[n - 1][:, starts[n - 1] :]
        mismatched.append(torch.cat([prompt, answer], dim=1)[:, : max(lengths)])
    tokens, targets = torch.cat(mismatched, 1)
    sizes = torch.tensor([row.shape[1] for row in mismatched])
    return {
        "input_ids": tokens[None],
        "position_ids": torch.cat([torch.arange(row.shape[1]) for row in mismatched])[None],
        "labels": targets[None],
        "cu_seqlens": F.pad(sizes.cumsum(0), (1, 0)).int(),
        **{name: batch[name] for name in ("row_ids", "source") if name in batch},
    }
