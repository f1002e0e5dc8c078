"""Training on pairs of answers, the better one first: DPO, IPO, SimPO and ORPO; kto.py has single answers."""

import hashlib
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lightning.model.adapters.inject import with_adapter
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.step.layout import MicroBatch
from qlora_lightning.model.step.loss import LossSums
from qlora_lightning.sources.folders import find_adapter_folder
from qlora_lightning.support.errors import UserError, check_setting
from qlora_lightning.support.settings import check_arguments

Objective = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
_BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
_REFERENCE = "reference"  # name of the adapter that the reference has


class _ByObjective:
    """Makes a :class:`~qlora_lightning.model.kto.KTOModule` of a :class:`PreferenceModule` with the objective ``kto``.

    It is a class of its own because jsonargparse takes parameters from ``__new__`` of a class that defines one.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from qlora_lightning.model.kto import KTOModule

        objective = kwargs.get("objective", args[1] if len(args) > 1 else None)
        if objective != "kto" or issubclass(cls, KTOModule):
            return super().__new__(cls)
        if cls is not PreferenceModule:
            raise UserError(
                f"{cls.__name__} inherits from PreferenceModule, that of pairs: for kto from KTOModule.",
                "model.objective",
            )
        return super().__new__(cast(Any, KTOModule))


class PreferenceModule(_ByObjective, QLoRAModule):
    """A :class:`QLoRAModule` that learns to prefer one answer to another; takes a :class:`PreferenceDataModule`.

    Rows are pairs of answers, of ``kto`` single ones with a verdict, desirable or not.

    The reference of ``dpo``, ``ipo`` and ``kto`` is the model before training: the same base with its adapter
    switched off, or with the adapter that ``adapter`` names.

    Logs, beside ``train_loss`` (per row, of ``kto`` without its weights) and ``grad_norm``, for each split
    ``…_reward_accuracy`` (share of pairs whose chosen answer has the larger reward), ``…_preference_accuracy`` (share
    of pairs whose chosen answer is the likelier one per token, as ``evaluate`` reports), ``…_margin`` (mean difference
    of the rewards), ``…_chosen_reward`` and ``…_rejected_reward``. A reward is ``beta`` times the log-probability of an
    answer, against the reference's if there is one, else per token. With ``kto`` a margin is how far the reward of a
    desirable answer is above ``beta · kl``, or that of another below; ``…_reward_accuracy`` is the share of positive
    margins; ``…_kl`` is the estimate of the divergence.

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
    accuracy = "preference_accuracy"
    logged: tuple[str, ...] = ("preference_accuracy", "reward_accuracy", "margin", "chosen_reward", "rejected_reward")

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
        check_arguments("model", PreferenceModule.__init__, locals())
        check_setting("model.gamma", gamma, gamma is None or objective == "simpo", "null, since only simpo has one")
        check_setting("model.sft_share", sft_share, not sft_share or objective != "kto", "0 with kto")
        self.objective, self.beta = objective, _BETAS[objective] if beta is None else beta
        self.gamma = 0.0 if objective != "simpo" else 1.0 if gamma is None else gamma
        self.sft_share = sft_share
        self._has_reference = objective in ("dpo", "ipo", "kto")
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

    def compute_loss(self, batch: Any) -> LossSums:
        """Sum the loss of the rows of a micro-batch, in which the two answers of a pair are neighbours, and rows."""
        micro_batch = self.micro_batch_of(batch)
        if not micro_batch.pairs:
            raise UserError(
                f"model.objective {self.objective} learns from pairs of answers, which the rows of data are not.",
                "model.objective",
            )
        n_answers = n_answers_of(micro_batch)
        references = None
        if self._has_reference:  # first, while no activations of the pass that trains are kept
            references = self.reference_log_probs(micro_batch)[:n_answers].view(-1, 2)
        log_probs = self.log_probs(micro_batch)[:n_answers].view(-1, 2)  # (pairs, 2)
        counts = torch.tensor(micro_batch.counts[:n_answers]).view(-1, 2).to(self.device, non_blocking=True)
        mean_log_probs = log_probs / counts  # per token
        if references is not None:
            ratios = log_probs - references
            rewards = self.beta * ratios
            scores = ratios / counts if self.objective == "ipo" else rewards
        else:
            rewards = scores = self.beta * mean_log_probs
        margins = rewards[:, 0] - rewards[:, 1]
        losses = self._losses(scores[:, 0] - scores[:, 1], mean_log_probs)
        likelier = mean_log_probs[:, 0] > mean_log_probs[:, 1]
        return self.sum_rows(losses, likelier, margins > 0, margins, rewards[:, 0], rewards[:, 1])

    def sum_rows(self, losses: Tensor, *metrics: Tensor) -> LossSums:
        """Sum the losses of rows, and the metrics that ``logged`` names, each ``(rows,)``."""
        return LossSums.of(losses, **dict(zip(self.logged, metrics, strict=True)))

    def _losses(self, score_diff: Tensor, mean_log_probs: Tensor) -> Tensor:
        """Compute the loss of each pair, ``(pairs,)``, from both log-probabilities per token, ``(pairs, 2)``.

        ``score_diff`` is the reward of the chosen answer minus that of the other, for ``ipo`` of log-ratios per token.
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

    def log_probs(self, micro_batch: MicroBatch) -> Tensor:
        """Compute the log-probability of each answer, ``(answers,)``."""
        nll, _ = self.token_losses(micro_batch)
        return -torch.stack([answer.sum() for answer in torch.split(nll, list(micro_batch.counts))])

    def reference_log_probs(self, micro_batch: MicroBatch) -> Tensor:
        """Compute the reference's log-probability of each answer, ``(answers,)``."""
        with torch.no_grad(), with_adapter(self.model, None if self._reference_adapter is None else _REFERENCE):
            return self.log_probs(micro_batch)


def n_answers_of(micro_batch: MicroBatch) -> int:
    """Return the number of answers; a dummy row has none."""
    return len(micro_batch.counts) if any(micro_batch.counts) else 0
