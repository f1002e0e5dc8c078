"""Our side: one epoch with QLoRAModule and InstructionDataModule, as research code would write it."""

from qlora_lightning import GradientCheckpointing, InstructionDataModule, QLoRAModule  # first: it imports quicker

# isort: split

import itertools
import tempfile
import time
from typing import Any

import lightning
import psutil
from lightning import Callback, LightningModule, Trainer

from tests.benchmarks import child
from tests.benchmarks.ceiling import measure_ceiling, synchronize

IMPORT_SECONDS = child.seconds_since_spawn()
_FOLDER = tempfile.TemporaryDirectory()  # removed at the end of the process


class Meter(Callback):
    """Time training or a validation, and if asked to each batch's ceiling right after it: machines vary by the minute.

    On a card the time begins after the first step, which compiles kernels.

    Attributes:
        tokens: Of all batches in ``seconds``; padding is not counted.
        seconds: Of the loop, without imports, loading, tokenizing, and what the ceilings took.
        start_seconds: From the start of the process to the first step.
        peak_bytes: Memory of the process until training ended.
        losses: Of each step.
        step_seconds: Of each step.
        ceilings: ``seconds`` and ``flop`` of each batch from ``first_ceiling`` on.
    """

    def __init__(self, first_ceiling: float = float("inf"), checkpointing: bool = False) -> None:
        self.tokens, self.seconds, self.start_seconds, self.peak_bytes = 0, 0.0, 0.0, 0
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.ceilings: list[dict[str, float]] = []
        self._first_ceiling, self._checkpointing = first_ceiling, checkpointing
        self._paused = 0.0

    def beside_ceiling(self) -> dict[str, float]:
        """Return tokens and seconds, and the ceiling's seconds and operations."""
        seconds, flop = (sum(ceiling[key] for ceiling in self.ceilings) for key in ("seconds", "flop"))
        return {"tokens": self.tokens, "seconds": self.seconds, "ceiling_seconds": seconds, "ceiling_flop": flop}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    on_validation_start = on_train_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start_seconds = self.start_seconds or child.seconds_since_spawn()
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"].item())  # waits for a card
        self.step_seconds.append(time.perf_counter() - self._step_began)
        self._count(pl_module, batch, batch_idx, trains=True)
        if pl_module.device.type == "cuda" and batch_idx == 0:
            self._began, self.tokens, self._paused = time.perf_counter(), 0, 0.0
            self.ceilings.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        self._count(pl_module, batch, batch_idx, trains=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self._began - self._paused
        self.peak_bytes = child.read_peak_bytes(pl_module.device.type == "cuda")

    on_validation_end = on_train_end

    def _count(self, module: LightningModule, batch: Any, batch_idx: int, trains: bool) -> None:
        self.tokens += int(batch["cu_seqlens"][-1])
        if batch_idx >= self._first_ceiling:
            synchronize(module.device)  # what a card has yet to do is the batch's own
            began = time.perf_counter()
            self.ceilings.append(measure_ceiling(module, batch, trains, self._checkpointing))
            self._paused += time.perf_counter() - began


class Room(Callback):
    """Lets the process take only so many more bytes, from the first step on; Linux alone has such a limit."""

    def __init__(self, more: int) -> None:
        self._more = more

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        process = psutil.Process()
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + self._more, psutil.RLIM_INFINITY))


def measure(
    base: str,
    source: dict[str, Any],
    accelerator: str,
    dtype: Any,
    checkpoint_every: int,
    ceilings: bool = False,
    steps: int = -1,
    room: int | None = None,
) -> dict[str, Any]:
    """Train one epoch, and with ``ceilings`` another beside its own; without checkpointing validate beside them too.

    The second epoch, and the second validation pass, have memory that the system has already handed over.

    Args:
        base: Folder of the base.
        source: Path and number of rows, as an entry of ``data.train``.
        accelerator: ``cpu`` or ``gpu``.
        dtype: Of products: ``bf16``, ``fp16`` or ``fp32``.
        checkpoint_every: Gradient checkpointing of every so many layers; 0: none.
        ceilings: Whether to measure them.
        steps: Of the epoch, at the most; -1: all.
        room: Bytes that the steps may take beside what is there; checkpointing then goes on by itself.
    """
    lightning.seed_everything(child.SEED)
    module = make_module(base, dtype)
    checkpointing = GradientCheckpointing("auto" if room else checkpoint_every > 0, max(checkpoint_every, 1))
    limits = {"max_epochs": 1, "max_steps": steps}

    def train(meter: Meter) -> None:
        trainer = make_trainer(accelerator, checkpointing, meter, *([Room(room)] if room else []), **limits)
        trainer.fit(module, make_data(base, train=source))

    train(meter := Meter())
    figures: dict[str, Any] = {
        "tokens": meter.tokens,
        "seconds": meter.seconds,
        "peak_bytes": meter.peak_bytes,
        "start_seconds": meter.start_seconds,
        "import_seconds": IMPORT_SECONDS,
        "losses": meter.losses,
        "versions": child.versions_of("torch", "lightning", "transformers", "peft", "bitsandbytes"),
    }
    if ceilings:
        train(steady := Meter(0, checkpoint_every > 0))
        figures["steady"] = steady.beside_ceiling()
    if ceilings and not checkpoint_every:
        validation_data = make_data(base, val=source)
        for _ in range(2):
            validation = Meter(0)
            make_trainer(accelerator, validation).validate(module, validation_data, verbose=False)
        figures["validation"] = validation.beside_ceiling()
    return figures


def make_module(base: str, dtype: Any) -> QLoRAModule:
    """Return the module that both sides agree on."""
    return QLoRAModule(
        base,
        quantization="nf4",
        double_quant=True,
        compute_dtype=dtype,
        rank=child.RANK,
        alpha=child.ALPHA,
        target_modules="all-linear",
        learning_rate=child.LEARNING_RATE,
        schedule="linear",
        warmup_ratio=0.0,
    )


def make_data(base: str, **splits: Any) -> InstructionDataModule:
    """Return the rows in the order of their file; the last answer of each is trained on."""
    return InstructionDataModule(
        **splits,
        max_length=child.MAX_LENGTH,
        batch_size=child.BATCH_SIZE,
        shuffle=False,
        tokenizer=base,
        train_on="last",
    )


def make_trainer(accelerator: str, *callbacks: Callback, **limits: int) -> Trainer:
    """Return a quiet trainer for one device."""
    return Trainer(
        accelerator=accelerator,
        devices=1,
        gradient_clip_val=child.GRADIENT_CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=_FOLDER.name,
        callbacks=list(callbacks),
        **limits,
    )


def read_samples(batches: Any) -> list[dict[str, list[int]]]:
    """Return ``input_ids`` and ``labels`` of each row of some flat batches."""
    samples = []
    for batch in batches:
        bounds = batch["cu_seqlens"].tolist()
        for start, end in itertools.pairwise(bounds):
            samples.append({key: batch[key][0, start:end].tolist() for key in ("input_ids", "labels")})
    return samples


if __name__ == "__main__":
    child.serve(measure)
