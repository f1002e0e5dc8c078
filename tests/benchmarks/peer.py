"""The peer: TRL's SFTTrainer set to the same work. It needs no more of this project than this folder."""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.benchmarks import settings
from tests.benchmarks.children import print_figures, seconds_since_spawn
from tests.benchmarks.figures import Figures, read_peak_bytes, versions_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Clock(TrainerCallback):
    """Time the start and the training loop; on a card from behind the first step, which compiles kernels."""

    def __init__(self, on_gpu: bool) -> None:
        self.seconds = self.start_seconds = 0.0
        self._began, self._on_gpu = 0.0, on_gpu

    def on_train_begin(self, *arguments: Any, **states: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, *arguments: Any, **states: Any) -> None:
        self.start_seconds = self.start_seconds or seconds_since_spawn()

    def on_step_end(self, args: Any, state: Any, *arguments: Any, **states: Any) -> None:
        if self._on_gpu and state.global_step == 1:
            torch.cuda.synchronize()
            self._began = time.perf_counter()

    def on_train_end(self, *arguments: Any, **states: Any) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began


def main() -> None:
    """Train one epoch over the file's pairs, from top to bottom, and print the figures."""
    parser = argparse.ArgumentParser(description="The peer's side of tests.benchmarks.")
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of products")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop there")
    arguments = parser.parse_args()
    lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()
    on_gpu = arguments.accelerator == "gpu"
    clock = Clock(on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=load_quantized(arguments.base, arguments.accelerator, _DTYPES[arguments.dtype]),
            processing_class=AutoTokenizer.from_pretrained(arguments.base),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=settings.RANK,
                lora_alpha=settings.ALPHA,
                lora_dropout=0.0,
                target_modules="all-linear",
            ),
            args=configure(folder, arguments),
            callbacks=[clock],
        )
        counted = trainer.train_dataset["input_ids"][settings.BATCH_SIZE * on_gpu :]
        tokens = sum(len(ids) for ids in counted)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = read_peak_bytes(on_gpu)
    versions = versions_of(["torch", "trl", "transformers", "peft", "bitsandbytes", *["liger-kernel"] * on_gpu])
    print_figures(asdict(Figures(tokens, clock.seconds, peak, clock.start_seconds, losses, versions)))


def load_quantized(base: str, accelerator: str, dtype: torch.dtype) -> Any:
    """Load the base in NF4 with double quantization."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device: str | int = 0 if accelerator == "gpu" else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )


def configure(folder: str, arguments: argparse.Namespace) -> SFTConfig:
    """Give the trainer's settings; all that is not named is TRL's default."""
    on_gpu = arguments.accelerator == "gpu"
    return SFTConfig(
        output_dir=folder,
        seed=settings.SEED,
        num_train_epochs=1,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=settings.BATCH_SIZE,
        max_length=settings.MAX_LENGTH,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type="linear",
        max_grad_norm=settings.GRADIENT_CLIP,
        gradient_checkpointing=arguments.gradient_checkpointing,
        bf16=arguments.dtype == "bf16",
        fp16=arguments.dtype == "fp16",
        use_cpu=not on_gpu,
        use_liger_kernel=on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
