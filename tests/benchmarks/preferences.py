"""Preferences: epochs of DPO over pairs, with our modules or with TRL's DPOTrainer, and what both make of a batch.

The peer's interpreter needs no more of this project than this folder.
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import child

PAIRS = 4  # of a micro-batch
BETA = 0.1


def measure(side: str, base: str, rows: str, dtype: str, epochs: int) -> dict[str, Any]:
    """Train some epochs over a file of ``prompt``, ``chosen`` and ``rejected``, from top to bottom, on the CPU.

    Returns:
        ``pairs``, ``seconds`` of the loop, ``peak_bytes``, and what one's own data module counts as ``tokens``.
    """
    return (_measure_ours if side == "ours" else _measure_peer)(base, rows, dtype, epochs)


def compute_loss(side: str, base: str, rows: str, dtype: str, gradients: str) -> dict[str, Any]:
    """Compute the ``loss`` of the first batch, and write its gradients, of an adapter that both sides draw alike."""
    if side == "ours":
        module, data = _make_ours(base, rows, dtype)
        module.configure_model()
        data.setup("fit")
        model, batch = module.model, next(iter(data.train_dataloader()))
    else:
        trainer = _make_peer(base, rows, dtype, epochs=1, folder=str(Path(gradients).parent))
        first = [trainer.train_dataset[row] for row in range(PAIRS)]
        end = trainer.processing_class.eos_token_id
        for row, name in itertools.product(first, ("chosen_ids", "rejected_ids")):
            if row[name][-2:-1] == [end]:  # the template's newline behind it, which ours does not train
                row[name] = row[name][:-1]
        model, batch = trainer.model, trainer.data_collator(first)
    trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    generator = torch.Generator().manual_seed(child.SEED)
    for parameter in trained:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02  # in float32: TRL rounds to bf16
    if side == "ours":
        sums = module.compute_loss(batch)
        loss = sums.nll_sum / sums.labelled_tokens
    else:
        loss = trainer.compute_loss(model, batch)
    loss.backward()
    torch.save(torch.cat([parameter.grad.flatten() for parameter in trained]), gradients)
    return {"loss": loss.item()}


def _make_ours(base: str, rows: str, dtype: Any) -> tuple[Any, Any]:
    from qlora_lightning import PreferenceDataModule, PreferenceModule

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
    return module, data


def _measure_ours(base: str, rows: str, dtype: str, epochs: int) -> dict[str, Any]:
    from tests.benchmarks.ours import Meter, make_trainer

    module, data = _make_ours(base, rows, dtype)
    meter = Meter()
    make_trainer("cpu", meter, max_epochs=epochs).fit(module, data)
    return {
        "tokens": meter.tokens,
        "seconds": meter.seconds,
        "peak_bytes": meter.peak_bytes,
        "losses": meter.losses,
        "versions": child.versions_of("torch", "lightning", "transformers", "peft", "bitsandbytes"),
    }


def _make_peer(base: str, rows: str, dtype: str, epochs: int, folder: str) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from tests.benchmarks.peer import load_base, make_arguments, make_lora_config

    texts = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    speakers = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pairs = [{key: [{"role": role, "content": row[key]}] for key, role in speakers.items()} for row in texts]
    return DPOTrainer(
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
    )


def _measure_peer(base: str, rows: str, dtype: str, epochs: int) -> dict[str, Any]:
    from tests.benchmarks.peer import Clock

    clock = Clock(on_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_peer(base, rows, dtype, epochs, folder)
        trainer.add_callback(clock)
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
    child.serve(lambda **options: (compute_loss if "gradients" in options else measure)(**options))
