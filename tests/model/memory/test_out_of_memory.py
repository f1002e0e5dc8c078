"""Out of memory is one sentence: where, in which batch, the peak, and what helps."""

import errno
import mmap
import re

import pytest
import torch
from lightning import Callback

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.memory.out_of_memory import is_out_of_memory
from qlora_lightning.support.errors import UserError
from tests.steps import make_trainer

HUGE = 1 << 60  # bytes that no allocator has


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


class Hungry(QLoRAModule):
    """Asks for memory in forward, or in backward, of training or of validation."""

    when = None

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        if self.when == "backward":
            sums.nll_sum.register_hook(lambda gradient: torch.empty(HUGE, dtype=torch.uint8))
        elif self.when == ("training" if self.trainer.training else "validation"):
            torch.empty(HUGE, dtype=torch.uint8)
        return sums


class InOptimizer(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.when == "optimizer":
            torch.empty(HUGE, dtype=torch.uint8)


@pytest.mark.parametrize("when", ["training", "backward", "validation", "optimizer"])
def test_a_run_ends_with_its_batch_the_peak_and_what_helps(tiny_base, rows_file, tmp_path, when):
    module = Hungry(str(tiny_base), rank=2)
    module.when = when
    split = {"train": str(rows_file), "val": str(rows_file) if when == "validation" else None}
    data = InstructionDataModule(**split, tokenizer=str(tiny_base), batch_size=4)
    with pytest.raises(UserError) as reported:
        make_trainer(tmp_path, max_epochs=1, callbacks=[InOptimizer()]).fit(module, data)
    batch = r"a batch of 4 rows and (\d+) tokens, the longest row (\d+)"
    place = "the optimizer's step" if when == "optimizer" else batch
    peak = r"the peak was \d+\.\d\d of \d+\.\d\d GiB"
    helps = r"data\.batch_size .* gradient_checkpointing\.enabled: true.*"
    found = re.fullmatch(rf"Out of memory on cpu in {place}; {peak}\. What helps: {helps}", str(reported.value))
    assert found, reported.value
    assert when == "optimizer" or 0 < int(found[2]) <= int(found[1])
    assert isinstance(reported.value.__cause__, RuntimeError)
