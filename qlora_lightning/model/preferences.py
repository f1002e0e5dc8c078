"""Training on preferences: pairs of answers, the better one first, or single answers with a verdict."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lightning.base.base_folder import find_adapter_folder
from qlora_lightning.base.tensors import IGNORED
from qlora_lightning.model.adapters.inject import with_adapter
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.step.batch import samples_of
from qlora_lightning.model.step.loss import LossSums
from qlora_lightning.model.step.micro_batch import run_micro_batches
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of, trainer_of

Objective = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
_BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
_LOGGED = ("accuracy", "margin", "chosen_reward", "rejected_reward")
_LOGGED_BY_KTO = ("loss", "accuracy", "margin", "kl")  # the loss without weights takes the place of the weighted one
_REFERENCE = "reference"  # name of the adapter that the reference has


class PreferenceModule(QLoRAModule):
    """A :class:`QLoRAModule` that learns to prefer one answer to another; takes a :class:`PreferenceDataModule`.

    Rows are pairs of answers, of ``kto`` single ones with a verdict, desirable or not.

    The reference of ``dpo``, ``ipo`` and ``kto`` is the model before training: the same base with its adapter
    switched off, or with the adapter that ``adapter`` names.

    Logs, beside ``train_loss`` (per row, of ``kto`` without its weights) and ``grad_norm``, for each split
    ``…_accuracy`` (share of pairs whose chosen answer has the larger reward), ``…_margin`` (mean difference of the
    rewards), ``…_chosen_reward`` and ``…_rejected_reward``. A reward is ``beta`` times the log-probability of an
    answer, against the reference's if there is one, else per token. With ``kto`` a margin is how far the reward of a
    desirable answer is above ``beta · kl``, or that of another below; accuracy is the share of positive margins;
    ``…_kl`` is the estimate of the divergence.

    Args:
        base: As in :class:`QLoRAModule`.
        objective: ``dpo`` (Rafailov et al. 2023), ``ipo`` (Azar et al. 2023), ``simpo`` (Meng et al. 2024), ``orpo``
            (Hong et al. 2024) or ``kto`` (Ethayarajh et al. 2024); ``simpo`` and ``orpo`` need no reference.
        beta: How far the model may go from the reference: the smaller, the farther; for ``simpo`` the scale of rewards,
            for ``orpo`` the weight of the odds ratio. ``None``: 0.1, for ``simpo`` 2.
        gamma: Target margin between the rewards of ``simpo``; ``None``: 1.
        sft_share: Factor of the chosen answer's loss per token, which is added; not for ``kto``.
        kwargs: More arguments of :class:`QLoRAModule`.
    """

    pairs = True

    def __init__(
        self,
        base: str,
        objective: Objective = "dpo",
        beta: float | None = None,
        gamma: float | None = None,
        sft_share: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(base, **kwargs)
        if objective not in _BETAS:
            raise UserError(f"model.objective is {objective!r}: expected {', '.join(_BETAS)}.")
        if beta is not None and not 0 < beta < math.inf:
            raise UserError(f"model.beta is {beta:g}: expected a positive number, such as {_BETAS[objective]:g}.")
        if gamma is not None and objective != "simpo":
            raise UserError(f"model.gamma is {gamma:g}, which {objective} has no use for: only simpo has.")
        if sft_share and objective == "kto":
            raise UserError(f"model.sft_share is {sft_share:g}, which kto has no use for.")
        self.objective, self.beta = objective, _BETAS[objective] if beta is None else beta
        self.gamma = 0.0 if objective != "simpo" else 1.0 if gamma is None else gamma
        self.sft_share = sft_share
        self._has_reference = objective in ("dpo", "ipo", "kto")
        self._logged = _LOGGED_BY_KTO if objective == "kto" else _LOGGED
        self._reference_adapter = self.adapter  # evaluation sets `adapter` to the trained one

    def configure_model(self) -> None:
        is_new = self.model is None
        super().configure_model()
        if is_new and self._reference_adapter is not None and self._has_reference:
            folder = find_adapter_folder(self._reference_adapter)
            self.add_adapter(_REFERENCE, folder)
            weights = (folder / "adapter_model.safetensors").read_bytes()
            self.identity["reference"] = hashlib.sha256(weights).hexdigest()[:16]  # a resume must use the same

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, batch: dict[str, Any]) -> LossSums:
        """Sum the loss of the rows of a flat batch, in which the two answers of a pair are neighbours.

        Labelled tokens are the number of rows. A pair is correct if its chosen answer is the likelier per token, a row
        of ``kto`` if its margin is positive.
        """
        is_kto = self.objective == "kto"
        kind, key = ("answers with a verdict", "desirable") if is_kto else ("pairs of answers", "pairs")
        if key not in batch:
            raise UserError(f"model.objective {self.objective} learns from {kind}, which the rows of data are not.")
        layout = self.layout_of(batch)
        batch = {**batch, "layout": layout}
        n_answers = len(layout.counts) if any(layout.counts) else 0  # a filler has none
        log_probs = self._log_probs(batch)[:n_answers]
        reference = self._reference_log_probs(batch)[:n_answers] if self._has_reference else None
        if is_kto:
            assert reference is not None
            return self._sum_kto(batch, log_probs - reference)
        log_probs = log_probs.view(-1, 2)  # (pairs, 2)
        counts = torch.tensor(layout.counts[:n_answers]).view(-1, 2).to(self.device, non_blocking=True)
        mean_log_probs = log_probs / counts  # per token
        if reference is not None:
            ratios = log_probs - reference.view(-1, 2)
            rewards = self.beta * ratios
            scores = ratios / counts if self.objective == "ipo" else rewards
        else:
            rewards = scores = self.beta * mean_log_probs
        margins = rewards[:, 0] - rewards[:, 1]
        losses = self._losses(scores[:, 0] - scores[:, 1], mean_log_probs)
        correct = mean_log_probs[:, 0] > mean_log_probs[:, 1]
        return self._sum(losses, correct, margins > 0, margins, rewards[:, 0], rewards[:, 1])

    def _sum(self, losses: Tensor, correct: Tensor, *logged: Tensor) -> LossSums:
        """Sum the losses of rows, whether they are correct, and what is logged, each ``(rows,)``."""
        sums = {name: values.detach().float().sum() for name, values in zip(self._logged, logged, strict=True)}
        return LossSums(losses.sum(), torch.full((), len(losses), device=self.device), correct.sum(), sums)

    def _losses(self, score_diff: Tensor, mean_log_probs: Tensor) -> Tensor:
        """Compute the loss of each pair, ``(pairs,)``.

        Args:
            score_diff: Reward of the chosen answer minus that of the other, for ``ipo`` log-ratios per token.
            mean_log_probs: Log-probability per token of both answers, ``(pairs, 2)``.
        """
        if self.objective == "ipo":  # Azar et al., equation 17, per token as the authors' results are
            losses = (score_diff - 1 / (2 * self.beta)).square()
        elif self.objective == "orpo":  # Hong et al., equations 6 and 7
            log_p = mean_log_probs.clamp(max=-1e-7)  # of a probability of 1 the odds are infinite
            log_odds = log_p - torch.log(-torch.expm1(log_p))
            losses = -mean_log_probs[:, 0] - self.beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
        else:  # Rafailov et al., equation 7; Meng et al., equation 6
            losses = -F.logsigmoid(score_diff - self.gamma)
        return losses - self.sft_share * mean_log_probs[:, 0]

    def _sum_kto(self, batch: Mapping[str, Any], ratios: Tensor) -> LossSums:
        """Sum ``1 - σ(± (β log-ratio - β KL))`` of each answer, ``(rows,)`` (Ethayarajh et al., equation 8)."""
        desirable = batch["desirable"][: len(ratios)]
        kl = batch["kl"] if "kl" in batch else self._estimate_kl(batch)
        margins = self.beta * (ratios - kl) * torch.where(desirable, 1.0, -1.0)
        desirable_weight, other_weight = self._weights() if self.training else (1.0, 1.0)
        losses = torch.sigmoid(-margins)
        weighted_losses = torch.where(desirable, desirable_weight, other_weight) * losses
        return self._sum(weighted_losses, margins > 0, losses, margins > 0, margins, kl.expand(len(ratios)))

    def _weights(self) -> tuple[float, float]:
        """Return the weights of desirable and other rows: the rarer kind in training weighs more, in proportion."""
        samples = samples_of(datamodule_of(trainer_of(self)), "train")
        verdicts = None if samples is None else samples.desirable
        if verdicts is None:
            return 1.0, 1.0
        n_desirable, n_other = int(verdicts.sum()), int((~verdicts).sum())
        return max(1.0, n_other / max(n_desirable, 1)), max(1.0, n_desirable / max(n_other, 1))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.objective == "kto" and getattr(datamodule_of(self.trainer), "batch_size", 0) == 1:
            raise UserError(
                "data.batch_size is 1: kto takes the answers of a batch's other rows, so expected 2 or more."
            )

    # ---- the divergence of kto ---------------------------------------------------------------------------------------

    def micro_batches(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        parts = super().micro_batches(batch)
        if self.objective == "kto" and "desirable" in batch:  # of the whole batch, however it is cut
            kl = self._estimate_kl(batch)
            parts = [{**part, "kl": kl} for part in parts]
        return parts

    def _estimate_kl(self, batch: Mapping[str, Any]) -> Tensor:
        """Estimate the divergence from the reference: the mean log-ratio of mismatched answers, at least 0.

        A single row, as in an evaluation, has no mismatched answer: 0.
        """
        ratio_sum, n_answers = torch.zeros((), device=self.device), 0
        if len(batch["row_ids"]) == 1 and self.sharded_base is None:  # else other ranks wait in their passes
            return ratio_sum
        with torch.no_grad():
            for part in run_micro_batches(self, mismatch_answers(batch)):
                log_probs = self._log_probs(part)
                ratio_sum += (log_probs - self._reference_log_probs(part)).sum()
                n_answers += sum(map(bool, part["layout"].counts))
        return (ratio_sum / n_answers).clamp(min=0) if n_answers > 1 else ratio_sum * 0.0

    def _log_probs(self, batch: dict[str, Any]) -> Tensor:
        """Compute the log-probability of each answer, ``(answers,)``."""
        nll, _ = self.token_losses(batch)
        return -torch.stack([answer.sum() for answer in torch.split(nll, batch["layout"].counts)])

    # ---- the reference -----------------------------------------------------------------------------------------------

    def _reference_log_probs(self, batch: dict[str, Any]) -> Tensor:
        """Compute the reference's log-probability of each answer, ``(answers,)``."""
        was_training = self.training
        self.eval()  # without dropout and noise
        try:
            with torch.no_grad(), with_adapter(self.model, None if self._reference_adapter is None else _REFERENCE):
                return self._log_probs(batch)
        finally:
            self.train(was_training)


def mismatch_answers(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Make a flat batch, on the host, of each prompt with the previous row's answer, the first with the last's.

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
        "row_ids": batch["row_ids"],
        "source": batch["source"],
    }
