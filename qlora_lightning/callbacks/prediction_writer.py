"""Writes what ``predict`` answers, a line of JSON per row."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.support.console import say
from qlora_lightning.support.files import write_whole
from qlora_lightning.support.trainer import gather_lists


class PredictionWriter(Callback):
    """Write ``predictions.jsonl`` into the run folder: the row, its own answer if it has one, and the model's.

    The first process writes those of all, in the order of the rows.
    """

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lines = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        tokenizer: Any = trainer.datamodule.tokenizer  # type: ignore[attr-defined]  # Trainer has it, untyped
        for answer, row_id, reference, row in zip(
            outputs, batch["row_ids"], batch["references"], batch["rows"], strict=True
        ):
            text = tokenizer.decode(answer)
            self._lines.append({"row": row_id, "prediction": text, "reference": reference, "input": row})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = sorted(gather_lists(trainer, self._lines), key=lambda line: line["row"])
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "predictions.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            say(f"{len(lines)} predictions: {file}")
