"""Training on pairs of answers, the better one first (DPO, IPO, SimPO, ORPO), or single ones with a verdict (KTO)."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lightning.model.adapters.inject import with_adapter
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.model.step.accumulate import evaluate
from qlora_lightning.model.step.layout import MicroBatch
from qlora_lightning.model.step.loss import LossSums
from qlora_lightning.model.step.packed import samples_of
from qlora_lightning.sources.folders import find_adapter_folder
from qlora_lightning.sources.tensors import IGNORED
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.settings import check_arguments
from qlora_lightning.support.trainer import datamodule_of, trainer_of
from qlora_lightning.support.values import check_setting

Objective = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
_BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
_REFERENCE = "reference"  # name of the adapter that the reference has


class _ByObjective:
    """Makes a :class:`KTOModule` of a :class:`PreferenceModule` with the objective ``kto``.

    It is a class of its own because jsonargparse takes parameters from ``__new__`` of a class that defines one.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
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
    """A :class:`QLoRAModule` that learns to prefer one answer to another; requires a :class:`PreferenceDataModule`.

    Rows are pairs of answers. For ``kto``, they are single answers with a verdict: desirable or not.

    The reference of ``dpo``, ``ipo`` and ``kto`` is the model before training. That is the same base with its adapter
    disabled, or with the adapter folder in ``adapter``.

    Logs ``train_loss`` (per row; for ``kto`` without its weights) and ``grad_norm``, and for each split:

    - ``…_reward_accuracy``: share of pairs whose chosen answer has the larger reward.
    - ``…_preference_accuracy``: share of pairs whose chosen answer is the likelier one per token, as in ``evaluate``.
    - ``…_margin``: mean difference of the rewards.
    - ``…_chosen_reward`` and ``…_rejected_reward``: mean rewards. A reward is ``beta`` times the log-probability of an
      answer: relative to the reference if there is one, else per token.

    With ``kto``, a margin is how far the reward of a desirable answer is above ``beta · kl``, or that of an undesirable
    one below it. ``…_reward_accuracy`` is then the share of positive margins, and ``…_kl`` the estimated divergence.

    Args:
        base: As in :class:`QLoRAModule`.
        objective: ``dpo`` (Rafailov et al. 2023), ``ipo`` (Azar et al. 2023), ``simpo`` (Meng et al. 2024), ``orpo``
            (Hong et al. 2024) or ``kto`` (Ethayarajh et al. 2024); ``simpo`` and ``orpo`` need no reference.
        beta: Pull toward the reference: a smaller value lets the model move farther (``simpo``: scale of the rewards;
            ``orpo``: weight of the odds ratio); ``None`` means 0.1, or 2 for ``simpo``.
        gamma: Target margin between the rewards of ``simpo``; ``None`` means 1.
        sft_share: Weight of the chosen answer's loss per token, which is added to the loss; not for ``kto``.
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
        """Sum the loss of the rows of a micro-batch, in which the two answers of a pair are neighbors, and rows."""
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


class KTOModule(PreferenceModule):
    """A :class:`PreferenceModule` with the objective ``kto``, which makes one (Ethayarajh et al. 2024, KTO)."""

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

    An answer begins at the first labeled token, and is cut so that no row is longer than the longest of the batch.
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
