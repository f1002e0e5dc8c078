"""Our side: one epoch with QLoRAModule and InstructionDataModule, as research code would write it."""

import argparse
import tempfile
import time
from typing import Any

import lightning
from lightning import Callback, LightningModule, Trainer

from qlora_lightning import GradientCheckpointing, InstructionDataModule, QLoRAModule
from tests.benchmarks import settings
from tests.benchmarks.figures import print_figures


class Meter(Callback):
    """Time the training loop; count its tokens and collect its losses."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += batch["input_ids"].numel()
        self.losses.append(trainer.callback_metrics["train_loss"].item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began


def main() -> None:
    """Train one epoch and print the figures."""
    parser = argparse.ArgumentParser(description="Our side of tests.benchmarks.")
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args()
    lightning.seed_everything(settings.SEED)
    module = QLoRAModule(
        arguments.base,
        quantization="nf4",
        double_quant=True,
        compute_dtype="bf16",
        rank=settings.RANK,
        alpha=settings.ALPHA,
        target_modules="all-linear",
        learning_rate=settings.LEARNING_RATE,
        schedule="linear",
        warmup_ratio=0.0,
    )
    data = InstructionDataModule(
        train=arguments.data,
        format="prompt_completion",
        max_length=settings.MAX_LENGTH,
        batch_size=settings.BATCH_SIZE,
        tokenizer=arguments.base,
        train_on="last",  # the completion, as the peer does
    )
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=settings.GRADIENT_CLIP,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[GradientCheckpointing(enabled=arguments.gradient_checkpointing), meter],
        )
        trainer.fit(module, data)
    packages = ["torch", "lightning", "transformers", "peft", "bitsandbytes"]
    print_figures(meter.tokens, meter.seconds, meter.losses, packages)


if __name__ == "__main__":
    main()
