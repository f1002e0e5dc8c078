"""Writes the answers of ``predict``."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.support import files
from qlora_lightning.support.console import say
from qlora_lightning.support.trainer import datamodule_of, gather_lists


class PredictionWriter(Callback):
    """Write ``predictions.jsonl`` into the run folder: each row, its own answer if it has one, and the model's.

    Each process appends its answers to its own file as they come, which a stopped run leaves. At the end the first
    process writes those of all processes, in the order of the rows.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        prefix = f"{trainer.global_rank}-" if trainer.global_rank else ""
        self._unfinished = Path(trainer.default_root_dir) / f"{prefix}{files.UNFINISHED_PREDICTIONS}"
        self._lines: list[dict[str, Any]] = []
        files.set_aside(self._unfinished)

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
        files.append_json_lines(self._unfinished, lines)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = sorted(gather_lists(trainer, self._lines), key=lambda line: line["row"])
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / files.PREDICTIONS
            files.set_aside(file)  # hours of another predict
            files.write_whole(file, files.format_json_lines(lines))
            say(f"{len(lines)} predictions: {file}")
        files.set_aside(self._unfinished).unlink(missing_ok=True)
