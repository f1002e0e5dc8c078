"""Preferences: epochs of DPO over pairs, with our modules or with TRL's DPOTrainer.

The peer's interpreter needs no more of this project than this folder.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import child

PAIRS = 4  # of a micro-batch
BETA = 0.1


def measure(side: str, base: str, rows: str, dtype: str, epochs: int) -> dict[str, Any]:
    """Train some epochs over a file of ``prompt``, ``chosen`` and ``rejected``, from top to bottom, on the CPU.

    Returns:
        ``pairs``, ``seconds`` of the loop, ``peak_bytes``, and what one's own data module counts as ``tokens``.
    """
    return (_measure_ours if side == "ours" else _measure_peer)(base, rows, dtype, epochs)


def _measure_ours(base: str, rows: str, dtype: Any, epochs: int) -> dict[str, Any]:
    from qlora_lightning import PreferenceDataModule, PreferenceModule
    from tests.benchmarks.ours import Meter, make_trainer

    module = PreferenceModule(
        base,
        beta=BETA,
        compute_dtype=dtype,
        rank=child.RANK,
        alpha=child.ALPHA,
        learning_rate=child.LEARNING_RATE,
        schedule="linear",
        warmup_ratio=0.0,
    )
    data = PreferenceDataModule(rows, max_length=child.MAX_LENGTH, batch_size=PAIRS, shuffle=False, tokenizer=base)
    meter = Meter()
    make_trainer("cpu", meter, max_epochs=epochs).fit(module, data)
    return {
        "tokens": meter.tokens,
        "seconds": meter.seconds,
        "peak_bytes": meter.peak_bytes,
        "losses": meter.losses,
        "versions": child.versions_of("torch", "lightning", "transformers", "peft", "bitsandbytes"),
    }


def _measure_peer(base: str, rows: str, dtype: str, epochs: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from tests.benchmarks.peer import Clock, load_base, make_arguments, make_lora_config

    texts = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    speakers = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pairs = [{key: [{"role": role, "content": row[key]}] for key, role in speakers.items()} for row in texts]
    clock = Clock(on_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=load_base(base, dtype, on_gpu=False),
            processing_class=AutoTokenizer.from_pretrained(base),
            train_dataset=Dataset.from_list(pairs),
            peft_config=make_lora_config(),
            args=DPOConfig(  # all that is not named is TRL's default
                **make_arguments(folder, dtype, on_gpu=False) | {"num_train_epochs": epochs},
                beta=BETA,
                per_device_train_batch_size=PAIRS,
                gradient_checkpointing=False,
            ),
            callbacks=[clock],
        )
        tokens = epochs * sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for row in trainer.train_dataset
        )
        trainer.train()
    return {
        "tokens": tokens,
        "seconds": clock.seconds,
        "peak_bytes": child.read_peak_bytes(on_gpu=False),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "versions": child.versions_of("torch", "trl", "transformers", "peft", "bitsandbytes"),
    }


if __name__ == "__main__":
    child.serve(measure)
