"""Training on preferences: of two answers to a prompt the first is the better one, or an answer has a verdict."""

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.model.adapters.lora import with_adapter, without_adapters
from qlora_lightning.model.layers.attention import has_dropout
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.step.batch import is_flat, samples_of
from qlora_lightning.model.step.layout import IGNORED
from qlora_lightning.model.step.loss import LossSums, lm_head_of, token_losses
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of

Objective = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
_BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
_LOGGED = ("accuracy", "margin", "chosen_reward", "rejected_reward")
_LOGGED_BY_KTO = ("accuracy", "margin", "kl")
_REFERENCE = "reference"  # name of the adapter that the reference has


class PreferenceModule(QLoRAModule):
    """A :class:`QLoRAModule` that learns to prefer one answer to another; takes a :class:`PreferenceDataModule`.

    Rows are pairs of answers, of ``kto`` single ones with a verdict, desirable or not.

    The reference of ``dpo``, ``ipo`` and ``kto`` is the model as training found it: the same base with its adapter
    switched off, or with the adapter that ``adapter`` names.

    Logs, beside ``train_loss`` (per pair) and ``grad_norm``, for each split ``…_accuracy`` (share of pairs whose chosen
    answer has the larger reward), ``…_margin`` (mean difference of the rewards), ``…_chosen_reward`` and
    ``…_rejected_reward``. A reward is ``beta`` times the log-probability of an answer, against the reference's if there
    is one, else per token. Of ``kto`` a margin is by how much the reward of a desirable answer is above ``beta · kl``,
    or that of another below; accuracy is the share of positive margins; ``…_kl`` is the estimate of the divergence.

    Args:
        base: As of :class:`QLoRAModule`.
        objective: ``dpo`` (Rafailov et al. 2023), ``ipo`` (Azar et al. 2023), ``simpo`` (Meng et al. 2024), ``orpo``
            (Hong et al. 2024) or ``kto`` (Ethayarajh et al. 2024); ``simpo`` and ``orpo`` need no reference.
        beta: How far the model may go from the reference: the smaller, the farther; of ``simpo`` the scale of rewards,
            of ``orpo`` the weight of the odds ratio. ``None``: 0.1, of ``simpo`` 2.
        gamma: Of ``simpo``: by how much the chosen reward is to be larger; ``None``: 1.
        label_smoothing: Of ``dpo`` and ``simpo``: the share of pairs that are labelled the wrong way around.
        sft_share: Factor of the chosen answer's loss per token, which is added; not of ``kto``.
        desirable_weight: Of ``kto``: factor of the loss of desirable answers in training; ``None``: the rarer kind of
            the training rows weighs as much more as it is rarer.
        undesirable_weight: And of the others.
        kwargs: More arguments of :class:`QLoRAModule`.
    """

    pairs = True

    def __init__(
        self,
        base: str,
        objective: Objective = "dpo",
        beta: float | None = None,
        gamma: float | None = None,
        label_smoothing: float = 0.0,
        sft_share: float = 0.0,
        desirable_weight: float | None = None,
        undesirable_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base, **kwargs)
        if objective not in _BETAS:
            raise UserError(f"model.objective is {objective!r}: expected {', '.join(_BETAS)}.")
        if beta is not None and not 0 < beta < math.inf:
            raise UserError(f"model.beta is {beta:g}: expected a positive number, such as {_BETAS[objective]:g}.")
        if not 0 <= sft_share < math.inf:
            raise UserError(f"model.sft_share is {sft_share:g}: expected 0 (off) or more.")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"model.label_smoothing is {label_smoothing:g}: expected a share in [0, 0.5).")
        if gamma is not None and objective != "simpo":
            raise UserError(f"model.gamma is {gamma:g}, which {objective} has no use for: only simpo has.")
        if label_smoothing and objective not in ("dpo", "simpo"):
            raise UserError(
                f"model.label_smoothing is {label_smoothing:g}, which {objective} has no use for: only dpo and simpo."
            )
        if objective != "kto" and (desirable_weight is not None or undesirable_weight is not None):
            raise UserError(
                f"model.desirable_weight and undesirable_weight are of kto: {objective} has no use for them."
            )
        if objective == "kto" and sft_share:
            raise UserError(f"model.sft_share is {sft_share:g}, which kto has no use for.")
        self.objective, self.beta = objective, _BETAS[objective] if beta is None else beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.gamma = 0.0 if objective != "simpo" else 1.0 if gamma is None else gamma
        self.label_smoothing, self.sft_share = label_smoothing, sft_share
        self._logged = _LOGGED_BY_KTO if objective == "kto" else _LOGGED
        self._reference_adapter = self.adapter  # evaluation sets `adapter` to the trained one

    def configure_model(self) -> None:
        is_new = self.model is None
        trains = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING or self.trainer.ckpt_path
        is_reference = self._has_reference and self.adapter is not None and self.adapter == self._reference_adapter
        if is_reference and not trains:
            raise UserError(
                f"The adapter {self.adapter} would be compared with itself: model.adapter names the reference of "
                f"{self.objective}. Evaluate a run by its own config.yaml, or name its checkpoint by --ckpt_path."
            )
        super().configure_model()
        if is_new and self._reference_adapter is not None and self._has_reference:
            self.add_adapter(_REFERENCE, find_adapter_folder(self._reference_adapter))

    @property
    def _has_reference(self) -> bool:
        return self.objective in ("dpo", "ipo", "kto")

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, batch: dict[str, Any]) -> LossSums:
        """Sum the loss of the rows of a flat batch, in which the two answers of a pair are neighbours.

        What counts as a labelled token is a row; as correct a pair whose chosen answer is the likelier, per token, of
        ``kto`` a row with a positive margin.
        """
        kind, key = (
            ("answers with a verdict", "desirable") if self.objective == "kto" else ("pairs of answers", "pairs")
        )
        if key not in batch:
            raise UserError(f"model.objective {self.objective} learns from {kind}, which the rows of data are not.")
        layout = self.layout_of(batch)
        batch = {**batch, "layout": layout}
        nll = self._token_losses(batch)
        reference = self._reference_log_probs(batch) if self._has_reference else None
        if not any(layout.counts):  # a filler
            zeros = nll.new_zeros(())
            return LossSums(nll.sum() * 0.0, zeros.long(), zeros.long(), dict.fromkeys(self._logged, zeros))
        log_probs = -_sum_pieces(nll, layout.counts)  # a number for each answer
        if self.objective == "kto":
            assert reference is not None
            return self._sum_kto(batch, log_probs - reference)
        log_probs = log_probs.view(-1, 2)  # (pairs, 2)
        counts = torch.tensor(layout.counts, dtype=torch.float32).view(-1, 2).to(self.device, non_blocking=True)
        mean = log_probs / counts  # per token
        if reference is not None:
            ratios = log_probs - reference.view(-1, 2)
            rewards = self.beta * ratios
            compared = ratios / counts if self.objective == "ipo" else rewards
        else:
            rewards = compared = self.beta * mean
        losses = self._losses(compared[:, 0] - compared[:, 1], mean)
        rewards = rewards.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        logged = ((margins > 0).float(), margins, rewards[:, 0], rewards[:, 1])
        sums = {name: each.sum() for name, each in zip(_LOGGED, logged, strict=True)}
        likelier = (mean[:, 0] > mean[:, 1]).sum()
        return LossSums(losses.sum(), torch.full((), len(counts), device=self.device), likelier, sums)

    def _losses(self, difference: Tensor, mean: Tensor) -> Tensor:
        """Compute the loss of each pair, ``(pairs,)``.

        Args:
            difference: By how much the chosen answer is ahead: of its reward, of ``ipo`` of its log-ratio per token.
            mean: Log-probability per token of both answers, ``(pairs, 2)``.
        """
        if self.objective == "ipo":  # Azar et al., equation 17, per token as the authors' results are
            losses = (difference - 1 / (2 * self.beta)).square()
        elif self.objective == "orpo":  # Hong et al., equations 6 and 7
            certain = mean.clamp(max=-1e-7)  # of a probability of 1 the odds are infinite
            log_odds = certain - torch.log(-torch.expm1(certain))
            losses = -mean[:, 0] - self.beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
        else:  # Rafailov et al., equation 7; Meng et al., equation 6
            ahead = difference - self.gamma
            right, wrong = F.logsigmoid(ahead), F.logsigmoid(-ahead)
            losses = -(1 - self.label_smoothing) * right - self.label_smoothing * wrong
        return losses - self.sft_share * mean[:, 0]

    def _sum_kto(self, batch: Mapping[str, Any], ratios: Tensor) -> LossSums:
        """Sum ``1 - σ(± (β log-ratio - β KL))`` of each answer, ``(rows,)`` (Ethayarajh et al., equation 8)."""
        desirable = batch["desirable"]
        kl = batch["kl"] if "kl" in batch else self._estimate_kl(batch)
        margins = self.beta * (ratios - kl) * torch.where(desirable, 1.0, -1.0)
        of_desirable, of_others = self._weights() if self.training else (1.0, 1.0)
        losses = torch.where(desirable, of_desirable, of_others) * torch.sigmoid(-margins)
        right, margins = (margins > 0).sum(), margins.detach()
        sums = {"accuracy": right.float(), "margin": margins.sum(), "kl": kl * len(ratios)}
        return LossSums(losses.sum(), torch.full((), len(ratios), device=self.device), right, sums)

    def _weights(self) -> tuple[float, float]:
        """Return the factors of both kinds: the rarer one of the training rows weighs as much more as it is rarer."""
        samples = samples_of(datamodule_of(self._trainer), "train")
        verdicts = None if samples is None else samples.desirable
        good, bad = (1, 1) if verdicts is None else (int(verdicts.sum()), int((~verdicts).sum()))
        by_numbers = (max(1.0, bad / max(good, 1)), max(1.0, good / max(bad, 1)))
        asked = (self.desirable_weight, self.undesirable_weight)
        first, second = (found if own is None else own for own, found in zip(asked, by_numbers, strict=True))
        return first, second

    # ---- the divergence of kto ---------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        before = super().on_before_batch_transfer
        if self.objective == "kto" and is_flat(batch):
            return {**before(batch, dataloader_idx), "mismatched": before(self._mismatch(batch), dataloader_idx)}
        return before(batch, dataloader_idx)

    def _mismatch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return mismatch_answers(batch, getattr(datamodule_of(self._trainer), "max_length", None))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        after = super().on_after_batch_transfer
        if isinstance(batch, Mapping) and "mismatched" in batch:
            return {**after(batch, dataloader_idx), "mismatched": after(batch["mismatched"], dataloader_idx)}
        return after(batch, dataloader_idx)

    def micro_batches(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        parts = super().micro_batches(batch)
        if self.objective == "kto" and "desirable" in batch:  # of the whole batch, however it is cut
            kl = self._estimate_kl(batch)
            parts = [{**part, "kl": kl} for part in parts]
        return parts

    def _estimate_kl(self, batch: Mapping[str, Any]) -> Tensor:
        """Estimate how far the model is from the reference: by the mean log-ratio of mismatched answers, at least 0.

        A row that comes alone, as in an evaluation, has no other's answer: 0.
        """
        total, rows = torch.zeros((), device=self.device), 0
        if len(batch["row_ids"]) == 1 and self.sharded_base is None:  # else the others wait in their passes
            return total
        mismatched = batch["mismatched"] if "mismatched" in batch else self._mismatch(batch)
        with torch.no_grad():
            for part in self.micro_batches(mismatched):
                own = -_sum_pieces(self._token_losses(part), part["layout"].counts)
                total += (own - self._reference_log_probs(part)).sum()
                rows += sum(map(bool, part["layout"].counts))
        return (total / rows).clamp(min=0) if rows > 1 else total * 0.0

    def _token_losses(self, batch: dict[str, Any]) -> Tensor:
        hidden, targets = self.last_states(batch)
        with self.autocast():
            nll, _ = token_losses(hidden, targets, lm_head_of(self.causal_lm), fast=self.fast)
        return nll

    # ---- the reference -----------------------------------------------------------------------------------------------

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Let the model be what it was when training began."""
        if self._reference_adapter is None:
            return without_adapters(self.model)
        return with_adapter(self.model, _REFERENCE)

    def _reference_log_probs(self, batch: dict[str, Any]) -> Tensor:
        """Compute the reference's log-probability of each answer, ``(answers,)``."""
        noise, self.neftune_alpha = self.neftune_alpha, None
        drops = self.training and has_dropout(self.causal_lm)
        try:
            self.model.train(self.training and not drops)
            with torch.no_grad(), self.reference():
                return -_sum_pieces(self._token_losses(batch), batch["layout"].counts)
        finally:
            self.neftune_alpha = noise
            self.model.train(self.training)


def mismatch_answers(batch: Mapping[str, Any], max_length: int | None = None) -> dict[str, Any]:
    """Return a flat batch of each prompt with the answer of the row before, of the first with the last row's.

    It begins at the first labelled token, and is cut where a row has ``max_length`` tokens, by default as many as the
    longest of the batch.
    """
    bounds, ids, labels = batch["cu_seqlens"].tolist(), batch["input_ids"][0], batch["labels"][0]
    rows = [(ids[start:end], labels[start:end]) for start, end in itertools.pairwise(bounds)]
    longest = max_length or max(len(own) for own, _ in rows)
    prompts = [int((own != IGNORED).nonzero()[0]) if (own != IGNORED).any() else len(own) for _, own in rows]
    mixed = [
        tuple(torch.cat([mine[:prompt], theirs[other:]])[:longest] for mine, theirs in zip(row, before, strict=True))
        for row, before, prompt, other in zip(rows, _rotate(rows), prompts, _rotate(prompts), strict=True)
    ]
    lengths = torch.tensor([len(each) for each, _ in mixed])
    tokens, targets = (torch.cat(each)[None] for each in zip(*mixed, strict=True))
    return {
        "input_ids": tokens,
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None].to(tokens.device),
        "labels": targets,
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int().to(tokens.device),
        "row_ids": batch["row_ids"],
        "source": batch["source"],
    }


def _rotate(values: Sequence[Any]) -> list[Any]:
    return [*values[-1:], *values[:-1]]


def _sum_pieces(values: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.stack([piece.sum() for piece in torch.split(values, list(counts))])
