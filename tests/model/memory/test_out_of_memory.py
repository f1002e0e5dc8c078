"""Out of memory is one sentence: where, in which batch, and the cheapest changes that help."""

import errno
import mmap
import re

import lightning
import pytest
import torch
from lightning import Callback

from qlora_lightning import GradientCheckpointing, InstructionDataModule, QLoRAModule
from qlora_lightning.model.device import read_peak_gib
from qlora_lightning.model.memory.out_of_memory import MemorySettings, cheapest_changes, is_out_of_memory
from qlora_lightning.support.errors import UserError

HUGE = 1 << 60  # bytes that no allocator has
LENGTHS = [100] * 99 + [2_000]
CHECKPOINTING = "gradient_checkpointing.enabled: true (the same result, about a third slower)"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"rows": 8, "accumulate": 3, "batch_size": 8, "quantization": "int8", "lengths": LENGTHS},
            [
                "data.batch_size: 4 with trainer.accumulate_grad_batches: 6 (a step's rows stay as before)",
                CHECKPOINTING,
                "model.quantization: nf4",
            ],
        ),
        (  # what is done already is not proposed
            {"batch_size": 8, "checkpoints": True, "lengths": LENGTHS, "layers": 30, "all_layers": True},
            [
                "data.max_length: 100 (shortens 1 of 100 rows)",
                "model.layers: last:15 (trains, and keeps activations of, the upper half only)",
            ],
        ),
        ({"training": False, "rows": 8, "batch_size": 8, "layers": 30, "all_layers": True}, ["data.batch_size: 4"]),
        ({"checkpoints": True}, ["a smaller model.base"]),
    ],
)
def test_the_cheapest_changes_come_first_and_no_more_than_three(settings, expected):
    assert cheapest_changes(MemorySettings(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        # a step keeps its rows
        *(
            ({"rows": size, "batch_size": size}, f"data.batch_size: {rows} with trainer.accumulate_grad_batches: {n} ")
            for size, rows, n in ((6, 3, 2), (9, 3, 3), (7, 1, 7), (2, 1, 2))
        ),
        # a budget of tokens keeps room for the longest row
        (
            {"tokens_per_batch": 4096, "lengths": [1000], "accumulate": 2},
            "data.tokens_per_batch: 2048 with trainer.accumulate_grad_batches: 4 ",
        ),
        (
            {"tokens_per_batch": 4096, "lengths": [3000], "accumulate": 2},
            "data.tokens_per_batch: 3000 with trainer.accumulate_grad_batches: 3 ",
        ),
        ({"tokens_per_batch": 4096, "lengths": [4000]}, "data.max_length: 2000 (shortens 1 of 1 rows)"),
    ],
)
def test_fewer_tokens_a_batch_change_a_step_little(settings, begin):
    assert cheapest_changes(MemorySettings(checkpoints=True, **settings))[0].startswith(begin)


def raised_by(function, *arguments):
    with pytest.raises((RuntimeError, OSError)) as found:
        function(*arguments)
    return found.value


def test_what_allocators_raise_is_known_and_other_errors_are_not():
    for error in (
        raised_by(torch.empty, HUGE),
        raised_by(mmap.mmap, -1, HUGE),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes do not fit"), ValueError("DefaultCPUAllocator"), OSError(errno.ENOSPC, "full")):
        assert not is_out_of_memory(error)


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    def run(cls, *callbacks, val=False, **settings):
        module = cls(str(tiny_base), rank=2, **settings)
        split = {"train": str(rows_file), "val": str(rows_file) if val else None}
        data = InstructionDataModule(**split, tokenizer=str(tiny_base), batch_size=4)
        trainer = lightning.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "logger": False},
            **{"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data)

    return run


class InForward(QLoRAModule):
    def compute_loss(self, batch):
        if self.trainer.training:
            torch.empty(HUGE, dtype=torch.uint8)
        return super().compute_loss(batch)


class InBackward(QLoRAModule):
    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        sums.nll_sum.register_hook(lambda gradient: torch.empty(HUGE, dtype=torch.uint8))
        return sums


class InValidation(QLoRAModule):
    def compute_loss(self, batch):
        if not self.trainer.training:
            torch.empty(HUGE, dtype=torch.uint8)
        return super().compute_loss(batch)


class InOptimizer(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch.empty(HUGE, dtype=torch.uint8)


class OtherError(QLoRAModule):
    def compute_loss(self, batch):
        raise RuntimeError("shapes do not fit")


TRAINING = (
    r"Out of memory on cpu in a batch of 4 rows and (\d+) tokens, the longest row (\d+); "
    r"the peak was \d+\.\d\d of \d+\.\d\d GiB\. "
    r"The cheapest changes: \(1\) data\.batch_size: 2 with trainer\.accumulate_grad_batches: 2 \(.*\); "
    r"\(2\) gradient_checkpointing\.enabled: true \(.*\); \(3\) data\.max_length: \d+ \(shortens \d+ of 16 rows\)\."
)
IN_VALIDATION = r".*changes: \(1\) data\.batch_size: 2; \(2\) model\.quantization: nf4; \(3\) .*"


@pytest.mark.parametrize(
    ("cls", "callbacks", "options", "sentence"),
    [
        (InForward, (), {}, TRAINING),
        (InBackward, (), {}, TRAINING),
        (QLoRAModule, (InOptimizer(),), {}, "Out of memory on cpu in the optimizer's step; .*"),
        (InValidation, (), {"val": True, "quantization": "none"}, IN_VALIDATION),
    ],
    ids=["forward", "backward", "optimizer", "validation"],
)
def test_a_step_tells_its_batch_the_peak_and_three_changes(fit, cls, callbacks, options, sentence):
    with pytest.raises(UserError) as told:
        fit(cls, *callbacks, **options)
    found = re.fullmatch(sentence, str(told.value))
    if sentence is TRAINING:
        tokens, longest = map(int, found.groups())
        assert longest < tokens <= 4 * longest
    assert isinstance(told.value.__cause__, RuntimeError)


def test_no_pages_for_a_checkpointed_input_are_reported_too(fit, monkeypatch):
    usual = mmap.mmap

    def refuse(file, *more, **options):
        return usual(file, *((HUGE,) if file == -1 else more), **options)

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(UserError, match=r"Out of memory on cpu in a batch of 4 rows"):
        fit(QLoRAModule, GradientCheckpointing())


def test_other_errors_pass_as_they_are(fit):
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit(OtherError)


def test_the_peak_holds_what_was_freed():
    block = torch.ones(64 << 18)  # 64 MiB, written to
    size = block.nbytes / 1024**3
    del block
    assert read_peak_gib(torch.device("cpu")) > size
