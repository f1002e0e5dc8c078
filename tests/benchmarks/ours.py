"""Our side: one epoch with QLoRAModule and InstructionDataModule, as research code would write it."""

from tests.benchmarks import imports  # first: from the start of the process to here it imports, and nothing else

# isort: split

import argparse
import tempfile
from dataclasses import asdict
from typing import Any

import lightning
from lightning import Callback, Trainer

from qlora_lightning import GradientCheckpointing, InstructionDataModule, QLoRAModule
from qlora_lightning.model.device import ComputeDtype
from tests.benchmarks import settings
from tests.benchmarks.ceilings import Ceilings, add_ceilings
from tests.benchmarks.children import print_figures
from tests.benchmarks.figures import Figures, versions_of
from tests.benchmarks.meter import Meter, ValidationMeter


def main() -> None:
    """Train one epoch, and another whose steps stand beside their ceilings; after plain ones validate; print."""
    parser = argparse.ArgumentParser(description="Our side of tests.benchmarks.")
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of products")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--every-n-layers", type=int, default=1, help="of gradient checkpointing; more than 1: no ceiling"
    )
    parser.add_argument("--max-steps", type=int, default=-1, help="stop there, and measure no ceiling")
    parser.add_argument("--without-ceilings", action="store_true", help="train the epoch alone")
    arguments = parser.parse_args()
    lightning.seed_everything(settings.SEED)
    module, meter = make_module(arguments.base, arguments.dtype), Meter()
    data = make_data(arguments, train=arguments.data)
    train(module, data, arguments, [meter])
    ceiling = steady_seconds = validation = None
    if arguments.max_steps == -1 and arguments.every_n_layers == 1 and not arguments.without_ceilings:
        steady, ceilings = Meter(), Ceilings(arguments.gradient_checkpointing)
        train(module, data, arguments, [steady, ceilings])
        steady_seconds = steady.seconds - ceilings.seconds
        ceiling = add_ceilings(ceilings.measured)
        if not arguments.gradient_checkpointing:
            validation = validate(module, make_data(arguments, val=arguments.data), arguments.accelerator)
    versions = versions_of(["torch", "lightning", "transformers", "peft", "bitsandbytes"])
    figures = Figures(
        meter.tokens,
        meter.seconds,
        meter.peak_bytes,
        meter.start_seconds,
        meter.losses,
        versions,
        steady_seconds,
        ceiling,
        validation,
        imports.SECONDS,
    )
    print_figures(asdict(figures))


def make_module(base: str, dtype: ComputeDtype) -> QLoRAModule:
    """Make the module that both sides agree on."""
    return QLoRAModule(
        base,
        quantization="nf4",
        double_quant=True,
        compute_dtype=dtype,
        rank=settings.RANK,
        alpha=settings.ALPHA,
        target_modules="all-linear",
        learning_rate=settings.LEARNING_RATE,
        schedule="linear",
        warmup_ratio=0.0,
    )


def make_data(arguments: argparse.Namespace, **files: str) -> InstructionDataModule:
    """Make the data of one split."""
    return InstructionDataModule(
        **files,
        format="prompt_completion",
        max_length=settings.MAX_LENGTH,
        batch_size=settings.BATCH_SIZE,
        tokenizer=arguments.base,
        train_on="last",  # the completion, as the peer does
    )


def train(
    module: QLoRAModule, data: InstructionDataModule, arguments: argparse.Namespace, meters: list[Callback]
) -> None:
    """Train one epoch, or fewer steps."""
    checkpointing = GradientCheckpointing(arguments.gradient_checkpointing, arguments.every_n_layers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder,
            arguments.accelerator,
            [checkpointing, *meters],
            max_epochs=1,
            max_steps=arguments.max_steps,
        )
        trainer.fit(module, data)


def validate(module: QLoRAModule, data: InstructionDataModule, accelerator: str) -> dict[str, Any]:
    """Time a validation pass and its ceiling."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the second pass counts: in the first the system hands over fresh memory
            meter, ceilings = ValidationMeter(), Ceilings()
            make_trainer(folder, accelerator, [meter, ceilings]).validate(module, data, verbose=False)
    return {
        "tokens": ceilings.tokens,
        "seconds": meter.seconds - ceilings.seconds,
        "ceiling": add_ceilings(ceilings.measured),
    }


def make_trainer(folder: str, accelerator: str, callbacks: list[Callback], **limits: int) -> Trainer:
    """Make a quiet trainer for one device."""
    return Trainer(
        accelerator=accelerator,
        devices=1,
        gradient_clip_val=settings.GRADIENT_CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **limits,
    )


if __name__ == "__main__":
    main()
