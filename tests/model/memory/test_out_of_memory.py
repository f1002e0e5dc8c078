"""Out of memory is one sentence: where, in which batch, the peak, and what helps."""

import errno
import mmap
import re

import pytest
import torch
from lightning import Callback

from qlora_lightning import GradientCheckpointing, InstructionDataModule, QLoRAModule
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


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    def run(*callbacks, when=None, val=False, batches=None, accumulate=1, **settings):
        module = Hungry(str(tiny_base), rank=2, **settings)
        module.when = when
        split = {"train": str(rows_file), "val": str(rows_file) if val else None}
        data = InstructionDataModule(**split, tokenizer=str(tiny_base), **(batches or {"batch_size": 4}))
        options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "callbacks": list(callbacks)}
        make_trainer(tmp_path, **options).fit(module, data)

    return run


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
        torch.empty(HUGE, dtype=torch.uint8)


BATCH = r"in a batch of \d+ rows and (\d+) tokens, the longest row (\d+); the peak was \d+\.\d\d of \d+\.\d\d GiB\. "
CHECKPOINTING = r"gradient_checkpointing\.enabled: true \(.*\)"
FEWER = r"data\.{} with trainer\.accumulate_grad_batches: {}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (  # a step keeps its rows
            {"when": "training", "accumulate": 3},
            rf"{BATCH}What helps: \(1\) {FEWER.format('batch_size: 2', 6)}; \(2\) {CHECKPOINTING}\. `.*plan`.*",
        ),
        (
            {"when": "backward", "batches": {"tokens_per_batch": 600}},
            rf"{BATCH}.*\(1\) {FEWER.format('tokens_per_batch: 300', 2)}; .*",
        ),
        (
            {"when": "validation", "val": True, "quantization": "none", "batches": {"batch_size": 1}},
            rf"{BATCH}What helps: \(1\) model\.quantization: nf4\. .*",
        ),
    ],
    ids=["forward", "backward", "validation"],
)
def test_a_step_tells_its_batch_the_peak_and_what_helps(fit, options, sentence):
    with pytest.raises(UserError) as told:
        fit(**options)
    found = re.fullmatch(f"Out of memory on cpu {sentence}", str(told.value))
    assert found, told.value
    assert 0 < int(found[2]) <= int(found[1])
    assert isinstance(told.value.__cause__, RuntimeError)


def test_so_does_the_optimizers_step_and_what_is_switched_on_is_not_proposed(fit):
    with pytest.raises(UserError, match=r"in the optimizer's step; .* What helps: \(1\) a smaller model\.base\. `"):
        fit(InOptimizer(), GradientCheckpointing(), batches={"batch_size": 1})
