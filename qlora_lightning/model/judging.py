"""A LightningModule that judges flat batches by its loss, in validation and test, and wherever a loss is wanted."""

from typing import Any

from torch import Tensor

from qlora_lightning.model.answering import AnsweringModule
from qlora_lightning.model.guards.checks import check_token_ids
from qlora_lightning.model.layers.attention import NO_MASK, check_attends_flatly
from qlora_lightning.model.layers.elementwise import check_row_length
from qlora_lightning.model.layout import can_leave_out, fill_up, leave_out_unneeded
from qlora_lightning.model.loss import LossSums, head_loss, next_labels
from qlora_lightning.model.memory.out_of_memory import telling_out_of_memory
from qlora_lightning.model.neftune import embed_or_name
from qlora_lightning.model.statistics import TokenStatistics


class JudgingModule(AnsweringModule):
    """Computes the loss of flat batches, and logs it by split with perplexity and token accuracy.

    Attributes:
        neftune_alpha: Strength of the noise on the embeddings in training; ``None``: there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.neftune_alpha: float | None = None
        self.val_statistics, self.test_statistics = TokenStatistics(), TokenStatistics()

    def compute_loss(self, batch: dict[str, Any]) -> LossSums:
        """Sum the loss over a flat batch. Override it for another objective; sums, not means, are wanted.

        Args:
            batch: ``input_ids``, ``position_ids``, ``labels`` ``(1, tokens)``, ``cu_seqlens`` ``(samples + 1,)``, and
                ``longest``, the tokens of the longest sample.
        """
        hidden, targets = self.last_states(batch)
        with self.autocast():
            return head_loss(hidden, targets, self.causal_lm.get_output_embeddings(), fast=self.fast)

    def last_states(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute the states that the head reads, and name what is to be predicted from each.

        Only tokens that a label of this batch needs are computed (:attr:`leaves_out_unneeded`): what hooks on the
        model see is shorter than the batch.

        Args:
            batch: As of :meth:`compute_loss`.

        Returns:
            The last hidden states ``(K, width)`` and their targets ``(K,)``, -100 for nothing; the targets of a sample
            stand together, in the order of the samples.

        Raises:
            UserError: A token is not one of the base's, a row is too long for its rotary embedding, or the model does
                not attend within samples.
        """
        check_attends_flatly(self.causal_lm)
        trains = self._trainer is not None and self.trainer.training
        data = getattr(self.trainer, "datamodule", None) if trains else None
        check_row_length(self.causal_lm.config, batch["longest"])
        check_token_ids(batch, len(self.causal_lm.get_input_embeddings().weight), data)
        batch = {**batch, "targets": next_labels(batch["labels"][0])[None]}
        if self.leaves_out_unneeded:
            batch = leave_out_unneeded(batch)
        if self.fast and self.device.type == "cpu":
            batch = fill_up(batch)
        with self.autocast():
            hidden = self.causal_lm.base_model(
                **embed_or_name(self.causal_lm, batch, self.neftune_alpha if self.training else None),
                position_ids=batch["position_ids"],
                attention_mask=NO_MASK,
                cu_seqlens=batch["cu_seqlens"],
                longest=batch["longest"],
                stream_places=batch.get("stream_places"),
                use_cache=False,
            ).last_hidden_state
        return hidden[0], batch["targets"][0]

    @property
    def leaves_out_unneeded(self) -> bool:
        """Whether the loss is computed without the tokens that it does not need; not under NEFTune's noise."""
        has_noise = self.training and self.neftune_alpha is not None
        return self.fast and not has_noise and can_leave_out(self.causal_lm, self.training)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with telling_out_of_memory(self, batch):
            self.val_statistics.update(self.compute_loss(batch))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with telling_out_of_memory(self, batch):
            self.test_statistics.update(self.compute_loss(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_statistics("val", self.val_statistics)

    def on_test_epoch_end(self) -> None:
        self._log_statistics("test", self.test_statistics)

    def _log_statistics(self, split: str, statistics: TokenStatistics) -> None:
        values = {f"{split}_{name}": value.float() for name, value in statistics.compute().items()}
        # They are those of all ranks already; their mean over ranks is the same, and Lightning wants it.
        self.log(f"{split}_loss", values.pop(f"{split}_loss"), prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)
        statistics.reset()
