"""Training on preferences: two answers to each prompt, of which the first is the better one."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.model.adapters.lora import with_adapter, without_adapters
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.model.layers.attention import has_dropout
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.sharded import collective_passes
from qlora_lightning.model.step.batch import samples_of
from qlora_lightning.model.step.loss import LossSums, TokenStatistics, lm_head_of, token_losses
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of, gather_lists

Objective = Literal["dpo", "ipo", "simpo", "orpo"]
_BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}
_LOGGED = ("accuracy", "margin", "chosen_reward", "rejected_reward")
_REFERENCE = "reference"  # name of the adapter that the reference has
_REFERENCES = "reference_log_probs"  # key of a checkpoint
_SPLITS: dict[RunningStage | None, str] = {
    RunningStage.TRAINING: "train",
    RunningStage.VALIDATING: "val",
    RunningStage.TESTING: "test",
}


class PreferenceModule(QLoRAModule):
    """A :class:`QLoRAModule` that learns to prefer one answer to another; takes a :class:`PreferenceDataModule`.

    The reference of ``dpo`` and ``ipo`` is the model as training found it: the same base with its adapter switched off,
    or with the adapter that ``adapter`` names. Its log-probabilities are computed once for each row, and kept.

    Logs, beside ``train_loss`` (per pair) and ``grad_norm``, for each split ``…_accuracy`` (share of pairs whose chosen
    answer has the larger reward), ``…_margin`` (mean difference of the rewards), ``…_chosen_reward`` and
    ``…_rejected_reward``. A reward is ``beta`` times the log-probability of an answer, against the reference's if there
    is one, else per token.

    Args:
        base: As of :class:`QLoRAModule`.
        objective: ``dpo`` (Rafailov et al. 2023), ``ipo`` (Azar et al. 2023), ``simpo`` (Meng et al. 2024) or ``orpo``
            (Hong et al. 2024); the last two need no reference.
        beta: How far the model may go from the reference: the smaller, the farther; of ``simpo`` the scale of rewards,
            of ``orpo`` the weight of the odds ratio. ``None``: 0.1, of ``simpo`` 2.
        gamma: Of ``simpo``: by how much the chosen reward is to be larger; ``None``: 1.
        label_smoothing: Of ``dpo`` and ``simpo``: the share of pairs that are labelled the wrong way around.
        sft_share: Factor of the chosen answer's loss per token, which is added.
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
        self.objective, self.beta = objective, _BETAS[objective] if beta is None else beta
        self.gamma = 0.0 if objective != "simpo" else 1.0 if gamma is None else gamma
        self.label_smoothing, self.sft_share = label_smoothing, sft_share
        self.val_statistics, self.test_statistics = TokenStatistics(_LOGGED), TokenStatistics(_LOGGED)
        self._reference_adapter = self.adapter  # evaluation sets `adapter` to the trained one
        # of each split, by the hash of its rows: the reference's log-probabilities of the two answers of a row, (2,)
        self._references: dict[str, dict[int, Tensor]] = {}

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
        return self.objective in ("dpo", "ipo")

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, batch: dict[str, Any]) -> LossSums:
        """Sum the loss of the pairs of a flat batch, in which the two answers of a row are neighbours.

        What counts as a labelled token is a pair; as correct one whose chosen answer is the likelier, per token.
        """
        layout = self.layout_of(batch)
        batch = {**batch, "layout": layout}
        nll = self._token_losses(batch)
        reference = None
        if self._has_reference:
            with collective_passes(self):  # a process that knows it, or has a filler, computes none
                reference = self._reference_log_probs(batch) if any(layout.counts) else None
        counts = torch.tensor(layout.counts, dtype=torch.float32).view(-1, 2)
        log_probs = -_sum_pieces(nll, layout.counts).view(-1, 2)  # (pairs, 2), a number for each answer
        if not counts.any():  # a filler
            zeros = nll.new_zeros(())
            return LossSums(nll.sum() * 0.0, zeros.long(), zeros.long(), dict.fromkeys(_LOGGED, zeros))
        counts = counts.to(self.device, non_blocking=True)
        mean = log_probs / counts  # per token
        if reference is not None:
            ratios = log_probs - reference
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
        """Return the reference's log-probabilities of both answers of each pair, ``(pairs, 2)``."""
        known, rows = self._known_references(), batch["layout"].rows[::2]
        if known is not None and all(row in known for row in rows):
            return torch.stack([known[row] for row in rows])
        noise, self.neftune_alpha = self.neftune_alpha, None
        drops = self.training and has_dropout(self.causal_lm)
        try:
            self.model.train(self.training and not drops)
            with torch.no_grad(), self.reference():
                log_probs = -_sum_pieces(self._token_losses(batch), batch["layout"].counts).view(-1, 2)
        finally:
            self.neftune_alpha = noise
            self.model.train(self.training)
        if known is not None:
            known.update(zip(rows, log_probs, strict=True))
        return log_probs

    def _known_references(self) -> dict[int, Tensor] | None:
        """Return what is kept of the split at work, by row; ``None`` if its rows do not come again."""
        trainer = self._trainer
        split = None if trainer is None else _SPLITS.get(trainer.state.stage)
        samples = samples_of(datamodule_of(trainer), split)
        if samples is None:
            return None
        return self._references.setdefault(samples.rows_hash, {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = {
            split: {"rows": torch.tensor(list(known)), "log_probs": torch.stack(list(known.values())).cpu()}
            for split, known in self._references.items()
            if known
        }
        checkpoint[_REFERENCES] = gather_lists(self.trainer, [own])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if str(checkpoint[KEY]["settings"].get("adapter")) != str(self.hparams.get("adapter")):
            return  # they are of another reference
        states: Sequence[Mapping[str, Any]] = checkpoint.get(_REFERENCES, [])
        rank, world_size = (0, 1) if self._trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if len(states) == world_size:  # else they are computed again
            for split, state in states[rank].items():
                values = state["log_probs"].to(self._device_of_process())  # the module comes there later
                self._references[split] = dict(zip(state["rows"].tolist(), values, strict=True))


def _sum_pieces(values: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.stack([piece.sum() for piece in torch.split(values, list(counts))])
