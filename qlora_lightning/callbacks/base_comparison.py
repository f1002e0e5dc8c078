"""What training has changed: base and adapter on the same validation rows, side by side."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import rich
import torch
from lightning import Callback, LightningModule, Trainer
from rich.markup import escape
from rich.table import Table

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.model.adapter_folder import loading_snippet
from qlora_lightning.model.adapter_reading import read_identity
from qlora_lightning.model.adapters import copy_tensors, trainable_tensors
from qlora_lightning.model.statistics import TokenStatistics
from qlora_lightning.trainer import callbacks_of, is_trial_run


class BaseComparison(Callback):
    """Print at the end of a fit: loss, perplexity and token accuracy of base and best adapter, and a few answers.

    The base comes free: it is the same model with its adapters switched off.

    Args:
        samples: How many validation rows to answer with both.
        max_new_tokens: Where an answer is cut.

    Attributes:
        result: ``base`` and ``adapter`` with their metrics, and ``samples`` (``prompt``, ``expected``, ``base``,
            ``adapter``); ``None`` where nothing was compared.
    """

    def __init__(self, samples: int = 3, max_new_tokens: int = 96) -> None:
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.result: dict[str, Any] | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.result = None
        if is_trial_run(trainer) or not hasattr(module.model, "disable_adapter"):
            return
        if trainer.val_dataloaders and trainer.global_step:
            with _best_adapter(trainer, module), torch.no_grad():
                self._compare(trainer, module)
        folder = AdapterCheckpoint.adapter_folder(trainer.default_root_dir)
        if trainer.is_global_zero and (folder / "adapter_config.json").exists():
            rich.print(f"\nAdapter: [bold]{escape(str(folder))}[/bold]. To load it with plain PEFT:\n")
            print(loading_snippet(folder, read_identity(folder)))

    def _compare(self, trainer: Trainer, module: Any) -> None:
        batches = list(trainer.val_dataloaders)  # type: ignore[arg-type]  # a loader, or a list of batches
        adapter = _judge(trainer, module, batches)
        with module.model.disable_adapter():
            base = _judge(trainer, module, batches)
        if trainer.is_global_zero:
            rich.print(_metrics_table(base, adapter))
            self.result = {"base": base, "adapter": adapter, "samples": []}
            self._show_answers(trainer, module, batches[0], self.result["samples"])

    def _show_answers(self, trainer: Trainer, module: Any, batch: Any, shown: list[dict[str, str]]) -> None:
        data = getattr(trainer, "datamodule", None)
        tokenizer, stop_ids = getattr(data, "tokenizer", None), getattr(data, "stop_ids", None)
        if tokenizer is None or not stop_ids:
            return
        rows = list(_split(batch))[: self.samples]
        prompts = [prompt for prompt, _ in rows]
        adapter = tokenizer.batch_decode(module.answer(prompts, stop_ids, self.max_new_tokens))
        with module.model.disable_adapter():
            base = tokenizer.batch_decode(module.answer(prompts, stop_ids, self.max_new_tokens))
        for (prompt, reference), before, after in zip(rows, base, adapter, strict=True):
            table = Table(show_header=False, expand=True, title_justify="left")
            table.add_column(style="dim", no_wrap=True, width=8)
            table.add_column(overflow="fold")
            expected = tokenizer.decode(reference, skip_special_tokens=True)
            question = tokenizer.decode(_last_turn(prompt, stop_ids), skip_special_tokens=True)
            question = question.strip().removeprefix("user\n")  # what ChatML and Llama-3 leave of the turn's header
            shown.append({"prompt": question, "expected": expected, "base": before, "adapter": after})
            for name, text in shown[-1].items():
                table.add_row(name, escape(_shorten(text)))
            rich.print(table)


@contextlib.contextmanager
def _best_adapter(trainer: Trainer, module: Any) -> Iterator[None]:
    """Hold the best adapter in the model, and put the last one back."""
    writer: Any = next((c for c in callbacks_of(trainer) if isinstance(c, AdapterCheckpoint)), None)
    best = writer.read_best(trainer.default_root_dir) if writer else None
    if best is None:
        yield
        return
    last = {name: tensor.detach().clone() for name, tensor in trainable_tensors(module).items()}
    copy_tensors(module, best, "The best adapter")
    try:
        yield
    finally:
        copy_tensors(module, last, "The last adapter")


def _judge(trainer: Trainer, module: Any, batches: list[Any]) -> dict[str, float]:
    """Judge the model as it is now on all validation batches, over all ranks."""
    was_training = module.training
    module.eval()
    statistics = TokenStatistics().to(module.device)
    for batch in batches:
        batch = trainer.strategy.batch_to_device(batch, module.device)
        statistics.update(module.compute_loss(batch))
    module.train(was_training)
    return {name: float(value) for name, value in statistics.compute().items()}


def _metrics_table(base: dict[str, float], adapter: dict[str, float]) -> Table:
    table = Table(title="Validation rows, base → adapter", title_justify="left")
    for heading in ("", "base", "adapter"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in base:
        table.add_row(name.replace("_", " "), f"{base[name]:.4f}", f"{adapter[name]:.4f}")
    return table


def _split(batch: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Give the samples of a flat batch, each as the ids before its first label and the labelled ids."""
    bounds = batch["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(bounds):
        labels = batch["labels"][0, start:end].tolist()
        first = next((place for place, label in enumerate(labels) if label != -100), None)
        if first is not None:
            yield batch["input_ids"][0, start : start + first].tolist(), [t for t in labels if t != -100]


def _shorten(text: str, most: int = 300) -> str:
    """Cut what a model that does not stop would fill the screen with."""
    text = text.strip()
    return text if len(text) <= most else f"{text[:most]} …"


def _last_turn(prompt: list[int], stop_ids: list[int]) -> list[int]:
    """Give the part of a prompt between its last two stop tokens: what was asked, without system prompt and header."""
    stops = [place for place, token in enumerate(prompt) if token in stop_ids]
    return prompt[(stops[-2] + 1 if len(stops) > 1 else 0) : (stops[-1] if stops else len(prompt))]
