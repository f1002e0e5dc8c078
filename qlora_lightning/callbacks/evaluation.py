"""Answers and scores: now and then during validation, and base against best adapter at the end of a fit."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rich
import torch
from lightning import Callback, LightningModule, Trainer
from rich.markup import escape

from qlora_lightning.callbacks.adapter_checkpoint import best_adapter
from qlora_lightning.evaluation.comparison import BASE, compare, duel
from qlora_lightning.evaluation.judge import Answering, EvaluationRow, answer_rows, cut_rows, judge_rows, steps_bar
from qlora_lightning.evaluation.report import (
    EVALUATION_FILE,
    describe_duel,
    metrics_table,
    samples_table,
    summarize,
    write_json,
)
from qlora_lightning.evaluation.scores import SCORES, Judgement, check_scores, describe_answered, judge_answer
from qlora_lightning.model.adapters.lora import without_adapters
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import gather_lists, is_trial_run

ADAPTER = "adapter"
_BESIDES = ("stop_rate", "answer_tokens")  # logged with the scores


class Evaluation(Callback):
    """Answer validation rows from their prompts alone, greedily, and score the answers.

    At the end of a fit base and best adapter are compared on all validation rows by their loss and on ``rows`` of them
    by their answers; what is printed goes to ``evaluation.json`` too. The base comes free: it is the same model with
    its adapters switched off. During validations, if asked for, the same rows are answered in the pass that
    makes the loss, and ``val_exact_match`` and the like are logged.

    Args:
        enabled: ``False`` leaves all of it out.
        rows: How many validation rows to answer, the first ones.
        every_n_validations: Also answer at every so many validations; ``None``: only at the end of the fit.
        max_new_tokens: Length at which an answer is cut; ``None``: at twice the longest expected one, from 32 to 512.
        scores: Names of scores, or ``auto``: those that fit the expected answers; see
            :func:`qlora_lightning.evaluation.scores.choose_scores`.
        batch_size: Rows that are answered together, at most.
        samples: How many rows to show with the answers of both.
    """

    def __init__(
        self,
        enabled: bool = True,
        rows: int = 100,
        every_n_validations: int | None = None,
        max_new_tokens: int | None = None,
        scores: str | list[str] = "auto",
        batch_size: int = 64,
        samples: int = 3,
    ) -> None:
        least = {"rows": (rows, 0), "batch_size": (batch_size, 1), "samples": (samples, 0)}
        optional = {"every_n_validations": every_n_validations, "max_new_tokens": max_new_tokens}
        least |= {name: (value, 1) for name, value in optional.items() if value is not None}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise UserError(f"evaluation.{name} is {value}: expected {smallest} or more.")
        check_scores(scores)
        self.enabled, self.rows, self.samples = enabled, rows, samples
        self.every_n_validations = every_n_validations
        self.max_new_tokens, self.scores, self.batch_size = max_new_tokens, scores, batch_size
        self.validations = 0  # of the fit that have ended
        self._collected: list[EvaluationRow] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def logs(self, name: str) -> bool:
        """Whether some validation of a fit logs a metric of that name."""
        score = name.removeprefix("val_")
        return self.enabled and bool(self.every_n_validations) and score != name and score in {*SCORES, *_BESIDES}

    # ---- during validation -----------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collected = [] if self._is_due(trainer) else None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._collected is not None and len(self._collected) < self._share(trainer):
            self._collected += [replace(row, batch={}) for row in cut_rows(batch)]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, self._collected = self._collected, None
        if rows is not None:
            rows = [row for row in rows if row.prompt is not None][: self._share(trainer)]
            self._log_scores(trainer, pl_module, rows)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validations += 1

    def _is_due(self, trainer: Trainer) -> bool:
        every = self.every_n_validations
        if not self.enabled or not every or trainer.sanity_checking or not _has_tokenizer(trainer):
            return False
        return trainer.state.fn != "fit" or (self.validations + 1) % every == 0

    def _share(self, trainer: Trainer) -> int:
        return math.ceil(self.rows / trainer.world_size)

    def _log_scores(self, trainer: Trainer, module: Any, rows: list[EvaluationRow]) -> None:
        answering = self._choose(trainer, rows)
        if answering is None:
            return
        sums = torch.zeros(len(answering.scores) + 3, dtype=torch.float64)
        for row, ids in zip(rows, answer_rows(module, rows, answering), strict=True):
            scores = judge_answer(answering.decode(ids), answering.decode(row.expected), answering.scores)
            stopped = float(len(ids) < answering.max_new_tokens)
            sums += torch.tensor([*scores.values(), stopped, float(len(ids)), 1.0], dtype=torch.float64)
        reduced: Any = trainer.strategy.reduce(sums.to(module.device), reduce_op="sum")
        *totals, count = reduced.tolist()
        names = [*answering.scores, *_BESIDES]
        means = {f"val_{name}": total / count for name, total in zip(names, totals, strict=True)}
        # They are those of all ranks already; their mean over ranks is the same, and Lightning wants it.
        module.log_dict(means, sync_dist=True)

    # ---- at the end of a fit ---------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if not self.enabled or is_trial_run(trainer) or not hasattr(module.model, "disable_adapter"):
            return
        if trainer.val_dataloaders and trainer.global_step:
            with best_adapter(trainer, module):
                self._compare(trainer, module)

    def _compare(self, trainer: Trainer, module: Any) -> None:
        rows = [row for batch in _validation_batches(trainer) for row in cut_rows(batch)]
        answered = min(self._share(trainer), len(rows))
        answering = self._choose(trainer, rows[:answered])
        steps = 2 * (len(rows) + (answered if answering else 0))
        with steps_bar("base and adapter on validation rows", steps, show=trainer.is_global_zero) as watch:
            after = judge_rows(module, rows, answering, answered, watch)
            with without_adapters(module.model):
                before = judge_rows(module, rows, answering, answered, watch)
        light = [replace(row, batch={}) for row in rows]
        gathered = gather_lists(trainer, list(zip(light, before, after, strict=True)))
        if trainer.is_global_zero and gathered:
            self._report(trainer, sorted(gathered, key=lambda each: each[0].number), answering)

    def _choose(self, trainer: Trainer, rows: Sequence[EvaluationRow]) -> Answering | None:
        """Choose scores and limits by what the rows of all processes answer; ``None`` if nothing can be answered."""
        asked = [replace(row, batch={}) for row in rows if row.prompt is not None]
        everyones = gather_lists(trainer, asked)
        if not everyones or not _has_tokenizer(trainer):
            return None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Trainer has it, untyped
        chosen = (self.scores, self.max_new_tokens, self.batch_size)
        return Answering.of(everyones, data.tokenizer, data.stop_ids, *chosen)

    def _report(
        self,
        trainer: Trainer,
        found: list[tuple[EvaluationRow, Judgement, Judgement]],
        answering: Answering | None,
    ) -> None:
        rows = [row for row, _, _ in found]
        judged = {BASE: [before for _, before, _ in found], ADAPTER: [after for _, _, after in found]}
        scores = answering.scores if answering else []
        measured = compare(judged, scores)
        duels = {ADAPTER: duel(judged[BASE], judged[ADAPTER], next(iter(scores), None))}
        summary = summarize(rows, judged, measured, answering, duels, self.samples)
        some = describe_answered(summary["answered_rows"], len(rows))
        rich.print(metrics_table(measured, f"Validation rows, base → adapter ({len(rows):,}{some}; 95 % intervals)"))
        if answering is not None and answering.mixture is not None:
            rich.print(escape(answering.mixture))
        rich.print(describe_duel(duels[ADAPTER]))
        for sample in summary["samples"]:
            rich.print(samples_table(sample))
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(summary, folder / EVALUATION_FILE)


def _has_tokenizer(trainer: Trainer) -> bool:
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "tokenizer", None) is not None and bool(getattr(data, "stop_ids", None))


def _validation_batches(trainer: Trainer) -> Iterator[Any]:
    """Return the batches of this process that a validation takes."""
    loaders: Any = trainer.val_dataloaders
    limits = trainer.num_val_batches
    several = isinstance(loaders, list)
    for loader, limit in zip(loaders if several else [loaders], limits, strict=False):
        yield from itertools.islice(loader, None if math.isinf(limit) else int(limit))
