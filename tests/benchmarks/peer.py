"""The peer: TRL's SFTTrainer set to the same work, on the token ids and labels that ours trains on.

Its interpreter needs no more of this project than this folder.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.benchmarks import child

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Clock(TrainerCallback):
    """Time the start and the training loop; on a card from after the first step, which compiles kernels."""

    def __init__(self, on_gpu: bool) -> None:
        self.seconds = self.start_seconds = 0.0
        self._began, self._on_gpu = 0.0, on_gpu

    def on_train_begin(self, *arguments: Any, **states: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, *arguments: Any, **states: Any) -> None:
        self.start_seconds = self.start_seconds or child.seconds_since_spawn()

    def on_step_end(self, args: Any, state: Any, *arguments: Any, **states: Any) -> None:
        if self._on_gpu and state.global_step == 1:
            torch.cuda.synchronize()
            self._began = time.perf_counter()

    def on_train_end(self, *arguments: Any, **states: Any) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began


def load_base(base: str, dtype: str, on_gpu: bool) -> Any:
    """Load a base in NF4 with double quantization, as ours does."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_DTYPES[dtype],
    )
    device = 0 if on_gpu else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=_DTYPES[dtype], device_map={"": device}, quantization_config=quantization
    )


def make_lora_config() -> LoraConfig:
    """Return the adapter that both sides agree on."""
    return LoraConfig(
        task_type="CAUSAL_LM", r=child.RANK, lora_alpha=child.ALPHA, lora_dropout=0.0, target_modules="all-linear"
    )


def make_arguments(folder: str, dtype: str, on_gpu: bool) -> dict[str, Any]:
    """Return what TRL's trainers are told alike: one epoch, and nothing shown or saved."""
    return {
        "output_dir": folder,
        "seed": child.SEED,
        "num_train_epochs": 1,
        "max_length": child.MAX_LENGTH,
        "optim": "adamw_torch_fused",
        "learning_rate": child.LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "max_grad_norm": child.GRADIENT_CLIP,
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def measure(
    base: str, samples: str, accelerator: str, dtype: str, checkpoint_every: int, steps: int = -1
) -> dict[str, Any]:
    """Train one epoch over a JSON file of samples, from top to bottom."""
    rows = json.loads(Path(samples).read_text(encoding="utf-8"))
    on_gpu = accelerator == "gpu"
    clock = Clock(on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=load_base(base, dtype, on_gpu),
            processing_class=AutoTokenizer.from_pretrained(base),
            train_dataset=Dataset.from_list(rows),
            peft_config=make_lora_config(),
            args=SFTConfig(  # all that is not named is TRL's default
                **make_arguments(folder, dtype, on_gpu),
                max_steps=steps,
                per_device_train_batch_size=child.BATCH_SIZE,
                train_sampling_strategy="sequential",
                gradient_checkpointing=checkpoint_every > 0,
                use_liger_kernel=on_gpu,
            ),
            callbacks=[clock],
        )
        trainer.train()
    packages = ["torch", "trl", "transformers", "peft", "bitsandbytes", *["liger-kernel"] * on_gpu]
    return {
        "tokens": sum(len(row["input_ids"]) for row in rows[child.BATCH_SIZE * on_gpu :]),
        "seconds": clock.seconds,
        "peak_bytes": child.read_peak_bytes(on_gpu),
        "start_seconds": clock.start_seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "versions": child.versions_of(*packages),
    }


if __name__ == "__main__":
    child.serve(measure)
