"""Run by each process of a launch: the same fit, after Lightning's learning-rate finder or without.

Usage: find_rates.py FILE, a JSON list: run folder, strategy, and what comes before (search, load, or nothing).
"""

import json
import sys
from pathlib import Path

import lightning
from hooks import Weigh
from lightning.pytorch.tuner.tuning import Tuner

from qlora_lightning import AdapterCheckpoint, InstructionDataModule, QLoRAModule

if __name__ == "__main__":
    for folder, strategy, before in json.loads(Path(sys.argv[1]).read_text()):
        lightning.seed_everything(7, verbose=False)
        module = QLoRAModule("untied", rank=2, dropout=0.1, learning_rate=1e-2, compute_dtype="fp32")
        data = InstructionDataModule("rows.jsonl", val="nine.jsonl", batch_size=2)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_steps=3,
            accumulate_grad_batches=2,
            logger=False,
            enable_progress_bar=False,
            callbacks=[AdapterCheckpoint(), Weigh()],
            default_root_dir=folder,
        )
        if before == "load":
            module.configure_model()
        if before == "search":
            found = Tuner(trainer).lr_find(module, datamodule=data, num_training=20, max_lr=0.1, update_attr=False)
            left = [file.name for file in Path(folder).rglob("*") if file.is_file()]
            Path(f"{folder}-{trainer.global_rank}.json").write_text(json.dumps([found.suggestion(), left]))
        trainer.fit(module, data)
