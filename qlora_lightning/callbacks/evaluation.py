"""Answers and scores: at every n-th validation, and of base and best adapter at the end of a fit."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import EvalResult, ModelCard
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint, best_adapter
from qlora_lightning.evaluation import row_results
from qlora_lightning.evaluation.comparison import Comparison, Results, sum_by_row
from qlora_lightning.evaluation.scores import (
    FORGETTING,
    Score,
    choose_scores,
    describe_answered,
    describe_metric,
    find_scores,
)
from qlora_lightning.support.console import count_of
from qlora_lightning.support.errors import UserError, is_out_of_memory, reason_of
from qlora_lightning.support.files import ADAPTER_FOLDER, CARD, EVALUATION, write_whole
from qlora_lightning.support.settings import check_arguments
from qlora_lightning.support.trainer import datamodule_of, find_callback, gather_lists, is_trial_run, say_once

T = TypeVar("T")
ForgettingLoss = dict[str, list[tuple[float, float]]]
"""For each side, nats and labeled tokens of each row."""
_MIN_NEW_TOKENS, _MAX_NEW_TOKENS = 32, 512
_NOT_EVALUATED = "Not evaluated at step {}: {} `qlora-lightning evaluate` can do it later."


class Evaluation(Callback):
    """Generate answers for validation rows from their prompts alone, greedily, and score them.

    At the end of a fit, base and best adapter are compared: by loss on all validation rows, and by generated answers on
    ``rows`` of them. The figures are printed and written to ``evaluation.json``. With ``every_n_validations``, answers
    for the same rows are also generated during validation, and ``val_exact_match`` and the like are logged.

    Args:
        enabled: ``False`` evaluates nothing.
        rows: Number of validation rows to generate answers for, evenly spaced.
        every_n_validations: Also generate at every Nth validation; ``None``: only at the end of the fit.
        max_new_tokens: Maximum length of an answer; ``None`` means twice the longest expected one, from 32 to 512.
        scores: Names of scores, your own functions ``(answer, expected) -> number from 0 to 1`` (in YAML by dotted
            path), or ``auto`` for those that fit the expected answers.
        batch_size: Maximum number of rows in a batch.
        samples: Number of rows to show with both answers.
        forgetting: A file of rows unrelated to the task, or a mapping such as ``{path: …, format: text}``. The loss of
            base and adapter on them shows how much was forgotten. With ``None``, it is not computed.
        forgetting_rows: Number of rows to read from that file. They are its first ones.
    """

    def __init__(
        self,
        enabled: bool = True,
        rows: int = 100,
        every_n_validations: int | None = None,
        max_new_tokens: int | None = None,
        scores: str | list[str | Score] = "auto",
        batch_size: int = 64,
        samples: int = 3,
        forgetting: str | dict[str, Any] | None = None,
        forgetting_rows: int = 100,
    ) -> None:
        check_arguments("evaluation", Evaluation.__init__, locals())  # they would fail after training
        find_scores([] if scores == "auto" else scores)
        self.enabled, self.rows, self.samples = enabled, rows, samples
        self.forgetting, self.forgetting_rows = forgetting, forgetting_rows
        self.every_n_validations = every_n_validations
        self.max_new_tokens, self.scores, self.batch_size = max_new_tokens, scores, batch_size
        self.validations = 0  # completed in this fit
        self._rows: list[row_results.EvaluationRow] | None = None  # None: this validation answers none
        self._forgetting_batches: Sequence[Any] = ()

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def choose_settings(
        self, trainer: Trainer, rows: Sequence[row_results.EvaluationRow]
    ) -> row_results.AnswerSettings | None:
        """Choose scores and limits from the expected answers of all processes; ``None`` if nothing can be answered."""
        answerable = gather_lists(trainer, [row for row in rows if row.prompt is not None])
        data = datamodule_of(trainer)
        if not answerable or not getattr(data, "tokenizer", None) or not getattr(data, "stop_ids", None):
            return None
        texts = data.tokenizer.batch_decode([row.expected for row in answerable], skip_special_tokens=True)
        scores = choose_scores([text.strip() for text in texts], self.scores)
        longest = max(len(row.expected) for row in answerable)
        limit = self.max_new_tokens or min(max(2 * longest, _MIN_NEW_TOKENS), _MAX_NEW_TOKENS)
        return row_results.AnswerSettings(data.tokenizer, list(data.stop_ids), scores, limit, self.batch_size)

    def evaluate_forgetting(self, module: Any, adapters: Mapping[str, str], show: bool) -> ForgettingLoss | None:
        """Compute nats and tokens of base and adapters on each row of the file ``forgetting``; ``None``: no row."""
        batches = self._forgetting_batches
        if not batches:
            return None
        numbers = [row.number for batch in batches for row in row_results.unpack_rows(batch)]
        results = row_results.evaluate_sides(module, batches, [], None, adapters, show, next_token=True)
        return {
            side: sum_by_row(
                (number, row.loss_sum, row.labelled_tokens) for number, row in zip(numbers, rows, strict=True)
            )
            for side, rows in results.items()
        }

    def read_forgetting(self, data: Any) -> None:
        """Read the file ``forgetting``, if it is set, before anything else is computed: it may be wrong."""
        file, n_rows = self.forgetting, self.forgetting_rows
        self._forgetting_batches = data.read_other_rows(file, n_rows) if file else ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.enabled and stage == "fit":  # before the base is loaded
            data = datamodule_of(trainer)
            if self.forgetting and "val" not in getattr(data, "samples", {}):
                message = "evaluation.forgetting is read with validation rows: set data.val or data.val_fraction."
                raise UserError(message, "evaluation.forgetting")
            self.read_forgetting(data)

    # ---- during validation -----------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every_n = self.every_n_validations
        is_due = trainer.state.fn != "fit" or (every_n and (self.validations + 1) % every_n == 0)
        self._rows = [] if self.enabled and every_n and is_due and not trainer.sanity_checking else None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        if self._rows is not None:
            self._rows += row_results.unpack_rows(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        is_due, rows, self._rows = self._rows is not None, self._rows or [], None
        answerable = row_results.keep_prompts(rows, self._share(trainer))
        settings = self.choose_settings(trainer, answerable) if is_due else None  # on all ranks alike
        if settings is not None:
            answers = _unless_out_of_memory(
                trainer, module, lambda: row_results.answer_rows(module, answerable, settings)
            )
            if answers is not None:
                figures = [answer.figures for answer in gather_lists(trainer, list(answers.values()))]
                means = {f"val_{name}": sum(row[name] for row in figures) / len(figures) for name in figures[0]}
                # They are means over all ranks already; sync_dist, which Lightning asks for, leaves them as they are.
                module.log_dict(means, sync_dist=True)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validations += 1

    def _share(self, trainer: Trainer) -> int:
        return math.ceil(self.rows / trainer.world_size)  # rows that each process answers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not is_trial_run(trainer):  # what is there is of an earlier adapter
            (Path(trainer.default_root_dir) / EVALUATION).unlink(missing_ok=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        has_adapter = hasattr(getattr(module, "model", None), "disable_adapter")
        if not self.enabled or is_trial_run(trainer) or not has_adapter or not trainer.global_step:
            return
        was_evaluated = (Path(trainer.default_root_dir) / EVALUATION).exists()
        data = datamodule_of(trainer)
        # a run that was killed during this evaluation has nothing left to train when it is resumed
        is_missing = not was_evaluated and "val" in getattr(data, "samples", {}) and trainer.limit_val_batches
        if trainer.val_dataloaders or is_missing:
            with best_adapter(trainer, module):
                self._compare(trainer, module)
            module.cpu()

    def _compare(self, trainer: Trainer, module: Any) -> None:
        # If nothing was left to train, the Trainer has no loader.
        loaders = trainer.val_dataloaders or datamodule_of(trainer).val_dataloader()
        loaders = loaders if isinstance(loaders, list) else [loaders]
        limit = trainer.limit_val_batches
        batches = [module.pack_batch(batch) for each in loaders for batch in row_results.take_batches(each, limit)]
        rows = [row for batch in batches for row in row_results.unpack_rows(batch)]
        rows_to_answer = row_results.keep_prompts(rows, self._share(trainer))
        settings = self.choose_settings(trainer, rows_to_answer)
        adapters = {"adapter": module.model.active_adapter}
        show = trainer.is_global_zero

        def evaluate() -> tuple[Results, ForgettingLoss | None]:
            module.to(trainer.strategy.root_device)  # the Trainer has moved it to the CPU by now
            results = row_results.evaluate_sides(module, batches, rows_to_answer, settings, adapters, show=show)
            return results, self.evaluate_forgetting(module, adapters, show)

        evaluated = _unless_out_of_memory(trainer, module, evaluate)
        if evaluated is None:
            return
        results, forgetting = evaluated
        gathered = gather_lists(trainer, list(zip(rows, *results.values(), strict=True)))
        if trainer.is_global_zero and gathered:
            rows, *sides = map(list, zip(*sorted(gathered, key=lambda entry: entry[0].number), strict=True))
            comparison = Comparison(rows, dict(zip(results, sides, strict=True)), settings, forgetting)
            comparison.print("validation row")
            comparison.print_rows(comparison.answered[: self.samples])
            figures = comparison.summary(self.samples)
            saved = find_callback(trainer, AdapterCheckpoint)
            if saved is not None and saved.enabled:
                _add_to_card(Path(trainer.default_root_dir) / ADAPTER_FOLDER / CARD, figures)
            write_whole(Path(trainer.default_root_dir) / EVALUATION, figures)  # last: a resume takes it for done


def _add_to_card(file: Path, figures: Mapping[str, Any]) -> None:
    """Add an evaluation to the card of the adapter, if there is a card, for the hub to show (``model-index``)."""
    card = ModelCard.load(file) if file.is_file() else None
    if card is None or card.data.pipeline_tag is None:  # of a classifier, for example
        return
    answered = describe_answered(figures["answered_rows"], figures["rows"])
    rows = f"{count_of(figures['rows'], 'validation row')}{answered}"
    card.data.model_name = "adapter"
    card.data.eval_results = [
        EvalResult(
            task_type=card.data.pipeline_tag,
            dataset_type="unknown",  # the rows are often of a file, or a part of a split
            dataset_name="other text" if name == FORGETTING else rows,
            dataset_split=None if name == FORGETTING else "validation",  # results are grouped by it, not by the name
            metric_type=name,
            metric_name=describe_metric(name),
            metric_value=sides["adapter"]["value"],
        )
        for name, sides in figures["metrics"].items()
        if sides["adapter"]["value"] is not None
    ]
    write_whole(file, str(card))


def _unless_out_of_memory(trainer: Trainer, module: Any, compute: Callable[[], T]) -> T | None:
    """Return what ``compute`` does; ``None`` on all processes if one runs out of memory, which must not end a fit."""
    faults, value = list[str](), None
    try:
        value = compute()
    except Exception as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        if module.sharded_base is not None and trainer.world_size > 1:  # the others wait in their passes
            message = _NOT_EVALUATED.format(trainer.global_step, error)
            raise UserError(f"{message} What was saved can be resumed.", "evaluation.memory") from error
        faults.append(f"{reason_of(error)}.")
    if faults := gather_lists(trainer, faults):
        say_once(_NOT_EVALUATED.format(trainer.global_step, faults[0]))
        return None
    return value
