"""Writes what ``predict`` answers, a line of JSON per row."""

import json
from pathlib import Path
from typing import Any

import rich
from lightning import Callback, LightningModule, Trainer
from rich.markup import escape


class PredictionWriter(Callback):
    """Write ``predictions.jsonl`` into the run folder: the row, its own answer if it has one, and the model's.

    Each rank writes a part, and the first puts the parts together in the order of the rows.
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
        parts: list[list[dict[str, Any]]] = [self._lines]
        if trainer.world_size > 1:
            parts = [[] for _ in range(trainer.world_size)]
            import torch.distributed

            torch.distributed.all_gather_object(parts, self._lines)
        if trainer.is_global_zero:
            lines = sorted((line for part in parts for line in part), key=lambda line: line["row"])
            file = Path(trainer.default_root_dir) / "predictions.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
            )
            unfinished.replace(file)
            rich.print(escape(f"{len(lines)} predictions: {file}"))
