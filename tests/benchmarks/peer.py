"""The peer: TRL's trainers set to the same work, SFTTrainer on the token ids and labels that ours trains on.

Its interpreter needs no more of this project than this folder.
"""

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

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

    def figures(self, tokens: int) -> dict[str, Any]:
        packages = ["trl", *["liger-kernel"] * self._on_gpu]
        figures = {"tokens": tokens, "seconds": self.seconds, "start_seconds": self.start_seconds}
        figures["peak_bytes"] = child.read_peak_bytes(self._on_gpu)
        return figures | {"versions": child.versions_of(*packages)}


def trainer_options(base: str, dtype: str, on_gpu: bool) -> dict[str, Any]:
    """Return base, tokenizer and adapter, as ours has them, for a trainer of TRL's."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=_DTYPES[dtype])
    options = {"device_map": {"": 0 if on_gpu else "cpu"}, "quantization_config": quantization}
    lora = {"r": child.RANK, "lora_alpha": child.ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return {
        "model": AutoModelForCausalLM.from_pretrained(base, dtype=_DTYPES[dtype], **options),
        "processing_class": AutoTokenizer.from_pretrained(base),
        "peft_config": LoraConfig(task_type="CAUSAL_LM", **lora),
    }


def config_options(folder: str, dtype: str, on_gpu: bool) -> dict[str, Any]:
    """Return the settings that TRL's trainers share; what is not named is TRL's default."""
    options = {"output_dir": folder, "seed": child.SEED, "num_train_epochs": 1, "max_length": child.MAX_LENGTH}
    options |= {"optim": "adamw_torch_fused", "max_grad_norm": child.GRADIENT_CLIP}
    options |= {"learning_rate": child.LEARNING_RATE, "lr_scheduler_type": "linear"}
    options |= {"bf16": dtype == "bf16", "fp16": dtype == "fp16"}
    options |= {"use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu}
    return options | {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def measure(
    base: str, samples: str, accelerator: str, dtype: str, checkpointing: bool, steps: int = -1
) -> dict[str, Any]:
    """Train one epoch over a JSON file of samples, from top to bottom."""
    rows = json.loads(Path(samples).read_text(encoding="utf-8"))
    on_gpu = accelerator == "gpu"
    clock = Clock(on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "gradient_checkpointing": checkpointing, "use_liger_kernel": on_gpu}
        settings |= {"per_device_train_batch_size": child.BATCH_SIZE, "train_sampling_strategy": "sequential"}
        config = SFTConfig(**config_options(folder, dtype, on_gpu), **settings)
        options = trainer_options(base, dtype, on_gpu)
        SFTTrainer(train_dataset=Dataset.from_list(rows), args=config, callbacks=[clock], **options).train()
    return clock.figures(sum(len(row["input_ids"]) for row in rows[child.BATCH_SIZE * on_gpu :]))


def train_preferences(base: str, rows: str, dtype: str) -> dict[str, Any]:
    """Train an epoch of DPO over a file of ``prompt``, ``chosen`` and ``rejected``, from top to bottom, on the CPU."""
    clock = Clock(on_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_preference_trainer(base, rows, dtype, folder)
        trainer.add_callback(clock)
        trainer.train()
    pairs = trainer.train_dataset
    lengths = (2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return clock.figures(sum(lengths))


def compare_preferences(base: str, rows: str, dtype: str, objective: str, gradients: str) -> dict[str, Any]:
    """Compute the loss of the first batch, and write its gradients."""
    trainer = _make_preference_trainer(base, rows, dtype, str(Path(gradients).parent), objective)
    first = [trainer.train_dataset[row] for row in range(child.PAIRS)]
    end = trainer.processing_class.eos_token_id
    for row, key in itertools.product(first, ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")):
        if key in row and row[key][-2:-1] == [end]:  # the template's newline behind it, which ours does not train
            row[key] = row[key][:-1]
    batch = trainer.data_collator(first)
    return child.take_first_step(trainer.model, lambda: trainer.compute_loss(trainer.model, batch), gradients)


def _make_preference_trainer(base: str, rows: str, dtype: str, folder: str, objective: str = "dpo") -> Any:
    texts = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    for row, key in itertools.product(texts, texts[0].keys() - {"label"}):
        row[key] = [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}]
    common = config_options(folder, dtype, on_gpu=False) | {"beta": child.BETA}
    common |= {"per_device_train_batch_size": child.PAIRS, "gradient_checkpointing": False}
    options = {"train_dataset": Dataset.from_list(texts), **trainer_options(base, dtype, on_gpu=False)}
    if objective == "kto":
        return KTOTrainer(args=KTOConfig(**common, train_sampling_strategy="sequential"), **options)
    return DPOTrainer(args=DPOConfig(**common), **options)
