"""Writes the answers of ``predict``."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.support.console import say
from qlora_lightning.support.files import (
    PREDICTIONS,
    UNFINISHED_PREDICTIONS,
    append_json_lines,
    format_json_lines,
    set_aside,
    write_whole,
)
from qlora_lightning.support.trainer import datamodule_of, gather_lists


class PredictionWriter(Callback):
    """Write ``predictions.jsonl`` into the run folder: each row, its own answer if it has one, and the model's.

    Each process appends its answers to its own file as they come, which a stopped run leaves. At the end the first
    process writes those of all processes, in the order of the rows.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = f"{trainer.global_rank}-{UNFINISHED_PREDICTIONS}" if trainer.global_rank else UNFINISHED_PREDICTIONS
        self._unfinished = Path(trainer.default_root_dir) / name
        self._lines: list[dict[str, Any]] = []
        set_aside(self._unfinished)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        tokenizer: Any = datamodule_of(trainer).tokenizer
        lines = [
            {
                "row": prompt.row_id,
                "prediction": tokenizer.decode(answer),
                "reference": prompt.reference,
                "input": prompt.values,
                "stopped": len(answer) < batch["max_new_tokens"],  # by itself, not cut
            }
            for answer, prompt in zip(outputs, batch["prompts"], strict=True)
        ]
        self._lines += lines
        append_json_lines(self._unfinished, lines)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = sorted(gather_lists(trainer, self._lines), key=lambda line: line["row"])
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / PREDICTIONS
            write_whole(file, format_json_lines(lines))
            say(f"{len(lines)} predictions: {file}")
        set_aside(self._unfinished).unlink(missing_ok=True)
