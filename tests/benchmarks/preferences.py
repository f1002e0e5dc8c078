"""Preferences: epochs of DPO with our modules or with TRL's, and what both make of a batch, by DPO and by KTO.

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
    """Train some epochs over a file of ``prompt``, ``chosen`` and ``rejected``, from top to bottom, on the CPU."""
    if side == "ours":
        from tests.benchmarks.ours import Meter, make_trainer

        module, data = _make_ours(base, rows, dtype)
        meter = Meter()
        make_trainer("cpu", meter, max_epochs=epochs).fit(module, data)
        return meter.figures()
    from tests.benchmarks.peer import Clock

    clock = Clock(on_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_peer(base, rows, dtype, epochs, folder)
        trainer.add_callback(clock)
        trainer.train()
    pairs = trainer.train_dataset
    lengths = (2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return clock.figures(epochs * sum(lengths))


def compute_loss(side: str, base: str, rows: str, dtype: str, gradients: str, objective: str) -> dict[str, Any]:
    """Compute the ``loss`` of the first batch, and write its gradients, of an adapter that both sides draw alike.

    By ``kto`` every other row has its rejected answer, with the verdict that it is not desirable.
    """
    if objective == "kto":
        pairs = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
        verdicts = [
            {"prompt": pair["prompt"], "completion": pair["rejected" if at % 2 else "chosen"], "label": at % 2 == 0}
            for at, pair in enumerate(pairs)
        ]
        rows = str(Path(gradients).with_suffix(".jsonl"))
        Path(rows).write_text("".join(json.dumps(row) + "\n" for row in verdicts), encoding="utf-8")
    if side == "ours":
        module, data = _make_ours(base, rows, dtype, objective)
        module.configure_model()
        data.setup("fit")
        model, batch = module.model, next(iter(data.train_dataloader()))
    else:
        trainer = _make_peer(base, rows, dtype, epochs=1, folder=str(Path(gradients).parent), objective=objective)
        first = [trainer.train_dataset[row] for row in range(PAIRS)]
        end = trainer.processing_class.eos_token_id
        for row, key in itertools.product(first, ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")):
            if key in row and row[key][-2:-1] == [end]:  # the template's newline behind it, which ours does not train
                row[key] = row[key][:-1]
        model, batch = trainer.model, trainer.data_collator(first)
    model.train()
    trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    generator = torch.Generator().manual_seed(child.SEED)
    for parameter in trained:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02  # in float32: TRL rounds to bf16
    if side == "ours":
        sums = module.compute_loss(batch)
        loss = sums.loss / sums.count
    else:
        loss = trainer.compute_loss(model, batch)
    loss.backward()
    torch.save(torch.cat([parameter.grad.flatten() for parameter in trained]), gradients)
    return {"loss": loss.item()}


def _make_ours(base: str, rows: str, dtype: Any, objective: str = "dpo") -> tuple[Any, Any]:
    from qlora_lightning import PreferenceDataModule, PreferenceModule
    from tests.benchmarks.ours import make_module

    data = PreferenceDataModule(rows, max_length=child.MAX_LENGTH, batch_size=PAIRS, shuffle=False, tokenizer=base)
    return make_module(base, dtype, PreferenceModule, beta=BETA, objective=objective), data


def _make_peer(base: str, rows: str, dtype: str, epochs: int, folder: str, objective: str = "dpo") -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    from tests.benchmarks.peer import config_options, trainer_options

    texts = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    for row, key in itertools.product(texts, texts[0].keys() - {"label"}):
        row[key] = [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}]
    common = config_options(folder, dtype, on_gpu=False) | {"num_train_epochs": epochs}
    common |= {"beta": BETA, "per_device_train_batch_size": PAIRS, "gradient_checkpointing": False}
    options = {"train_dataset": Dataset.from_list(texts), **trainer_options(base, dtype, on_gpu=False)}
    if objective == "kto":
        return KTOTrainer(args=KTOConfig(**common, train_sampling_strategy="sequential"), **options)
    return DPOTrainer(args=DPOConfig(**common), **options)


if __name__ == "__main__":
    child.serve(lambda **options: (compute_loss if "gradients" in options else measure)(**options))
