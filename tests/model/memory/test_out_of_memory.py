import errno
import mmap
import re

import lightning
import pytest
import torch
from lightning import Callback

from qlora_lightning import GradientCheckpointing, InstructionDataModule, QLoRAModule
from qlora_lightning.model.device import read_peak_gib
from qlora_lightning.model.memory.out_of_memory import is_out_of_memory, telling_out_of_memory
from qlora_lightning.support.errors import UserError

HUGE = 1 << 60  # bytes that no allocator has


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


def test_what_the_allocators_raise_is_known():
    with pytest.raises(RuntimeError) as found:
        torch.empty(HUGE, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(OSError, match="Cannot allocate memory") as refused:
        mmap.mmap(-1, HUGE)
    assert is_out_of_memory(refused.value)


OTHERS = [
    *(RuntimeError("shapes do not fit"), ValueError("DefaultCPUAllocator"), KeyError("x")),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_pass_through_as_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as found, telling_out_of_memory(None, None):
        raise error
    assert found.value is error


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


TOLD = re.compile(
    r"Out of memory on cpu in a batch of 4 rows and (\d+) tokens, the longest row (\d+); "
    r"the peak was \d+\.\d\d of \d+\.\d\d GiB\. "
    r"The cheapest changes: \(1\) data\.batch_size: 2 with trainer\.accumulate_grad_batches: 2 \(.*\); "
    r"\(2\) gradient_checkpointing\.enabled: true \(.*\); \(3\) data\.max_length: \d+ \(shortens \d+ of 16 rows\)\."
)


@pytest.mark.parametrize("cls", [InForward, InBackward])
def test_a_training_step_tells_its_batch_the_peak_and_three_changes(fit, cls):
    with pytest.raises(UserError) as told:
        fit(cls)
    tokens, longest = map(int, TOLD.fullmatch(str(told.value)).groups())
    assert longest < tokens <= 4 * longest
    assert isinstance(told.value.__cause__, RuntimeError)


def test_no_pages_for_a_checkpointed_input_are_told_too(fit, monkeypatch):
    usual = mmap.mmap

    def refuse(file, *more, **options):
        return usual(file, *((HUGE,) if file == -1 else more), **options)

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(UserError, match=r"Out of memory on cpu in a batch of 4 rows"):
        fit(QLoRAModule, GradientCheckpointing())


class InOptimizer(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch.empty(HUGE, dtype=torch.uint8)


def test_the_optimizers_step_is_told_too(fit):
    with pytest.raises(UserError, match="Out of memory on cpu in the optimizer's step; "):
        fit(QLoRAModule, InOptimizer())


class InValidation(QLoRAModule):
    def compute_loss(self, batch):
        if not self.trainer.training:
            torch.empty(HUGE, dtype=torch.uint8)
        return super().compute_loss(batch)


def test_in_validation_changes_are_those_that_help_there(fit):
    with pytest.raises(UserError, match=r"changes: \(1\) data\.batch_size: 2; \(2\) model\.quantization: nf4; \(3\) "):
        fit(InValidation, val=True, quantization="none")


def test_the_peak_holds_what_was_freed():
    block = torch.ones(64 << 18)  # 64 MiB, written to
    size = block.nbytes / 1024**3
    del block
    assert read_peak_gib(torch.device("cpu")) > size
