"""Our side: one epoch of instructions or preferences, as research code would write it."""

import itertools
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning import (
    GradientCheckpointing,
    InstructionDataModule,
    PreferenceDataModule,
    PreferenceModule,
    QLoRAModule,
)
from tests.benchmarks import child
from tests.steps import make_trainer as make_quiet_trainer

_FOLDER = tempfile.TemporaryDirectory()  # removed at the end of the process


class Meter(Callback):
    """Measure the figures of README.md's table; on a card from after the first step, which compiles kernels."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.start_seconds, self.peak_bytes = 0, 0.0, 0.0, 0
        self.step_seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start_seconds = self.start_seconds or child.seconds_since_spawn()
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.step_seconds.append(time.perf_counter() - self._step_began)
        self.tokens += int(batch["cu_seqlens"][-1])
        if pl_module.device.type == "cuda" and batch_idx == 0:
            self._began, self.tokens = time.perf_counter(), 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_bytes = child.read_peak_bytes(pl_module.device.type == "cuda")

    def figures(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in ("tokens", "seconds", "start_seconds", "peak_bytes")}
        return figures | {"versions": child.versions_of("lightning")}


class MemoryLimit(Callback):
    """Leave so many bytes of address space to the process before a step is planned and the base is loaded."""

    def __init__(self, spare_bytes: int) -> None:
        self._spare_bytes = spare_bytes

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        taken = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + self._spare_bytes, resource.RLIM_INFINITY))


def measure(
    base: str,
    source: dict[str, Any],
    accelerator: str,
    dtype: Any,
    checkpointing: bool,
    steps: int = -1,
    batch_size: int = child.BATCH_SIZE,
    spare_bytes: int | None = None,
) -> dict[str, Any]:
    """Train one epoch over ``source``, an entry of ``data.train``, or its first steps.

    In so many ``spare_bytes`` of memory a step has to fit itself.
    """
    lightning.seed_everything(child.SEED)
    module = make_module(base, dtype)
    meter = Meter()
    callbacks: list[Callback] = [GradientCheckpointing(checkpointing), meter]
    callbacks += [] if spare_bytes is None else [MemoryLimit(spare_bytes)]
    trainer = make_trainer(accelerator, *callbacks, max_epochs=1, max_steps=steps)
    trainer.fit(module, make_data(base, source, batch_size))
    return meter.figures() | {"loss": float(trainer.callback_metrics["train_loss"])}


def make_module(base: str, dtype: Any, cls: Any = QLoRAModule, **options: Any) -> Any:
    """Return the module that both sides agree on."""
    common = {"rank": child.RANK, "alpha": child.ALPHA, "learning_rate": child.LEARNING_RATE}
    return cls(base, compute_dtype=dtype, schedule="linear", warmup=0.0, **common, **options)


def make_data(base: str, source: dict[str, Any], batch_size: int = child.BATCH_SIZE) -> InstructionDataModule:
    """Return the rows in the order of their file; the last answer of each is trained on."""
    sizes = {"max_length": child.MAX_LENGTH, "batch_size": batch_size}
    return InstructionDataModule(source, **sizes, shuffle=False, tokenizer=base, train_on="last")


def make_trainer(accelerator: str, *callbacks: Callback, **limits: int) -> Trainer:
    options = {"accelerator": accelerator, "gradient_clip_val": child.GRADIENT_CLIP, "callbacks": list(callbacks)}
    trainer: Trainer = make_quiet_trainer(_FOLDER.name, **options, **limits)
    return trainer


def read_samples(base: str, source: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Return ``input_ids`` and ``labels`` of each row, for the peer."""
    data, samples = make_data(base, source), []
    data.setup("fit")
    for batch in data.train_dataloader():
        for start, end in itertools.pairwise(batch["cu_seqlens"].tolist()):
            samples.append({key: batch[key][0, start:end].tolist() for key in ("input_ids", "labels")})
    return samples


def train_preferences(base: str, rows: str, dtype: Any) -> dict[str, Any]:
    """Train an epoch of DPO over a file of ``prompt``, ``chosen`` and ``rejected``, from top to bottom, on the CPU."""
    meter = Meter()
    make_trainer("cpu", meter, max_epochs=1).fit(*_make_preferences(base, rows, dtype))
    return meter.figures()


def compare_preferences(base: str, rows: str, dtype: Any, objective: str, gradients: str) -> dict[str, Any]:
    """Compute the loss of the first batch, and write its gradients."""
    module, data = _make_preferences(base, rows, dtype, objective)
    module.configure_model()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))

    def compute_loss() -> torch.Tensor:
        sums = module.compute_loss(batch)
        loss: torch.Tensor = sums.loss_sum / sums.count
        return loss

    return child.take_first_step(module.model, compute_loss, gradients)


def _make_preferences(base: str, rows: str, dtype: Any, objective: str = "dpo") -> tuple[Any, PreferenceDataModule]:
    sizes = {"max_length": child.MAX_LENGTH, "batch_size": child.PAIRS}
    data = PreferenceDataModule(rows, **sizes, shuffle=False, tokenizer=base)
    return make_module(base, dtype, PreferenceModule, beta=child.BETA, objective=objective), data
