"""Out of memory is one sentence: where, in which batch, the peak, and what helps."""

import re

import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.support.errors import UserError
from tests.steps import fit


class Hungry(QLoRAModule):
    """Runs out of memory in backward, in a validation or in the optimizer's step."""

    when = None

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        if self.when == "backward":
            sums.nll_sum.register_hook(self.run_out)
        elif self.when == "validation" and not self.trainer.training:
            self.run_out()
        return sums

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        if self.when == "optimizer":
            self.run_out()

    def run_out(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("when", ["backward", "validation", "optimizer"])
def test_a_run_ends_with_its_batch_the_peak_and_what_helps(tiny_base, rows_file, tmp_path, when):
    module = Hungry(str(tiny_base), rank=2)
    module.when = when
    with pytest.raises(UserError) as reported:
        fit(module, tmp_path, rows_file, val=when == "validation", batch_size=4, max_epochs=1)
    batch = r"a batch of 4 rows and \d+ tokens, the longest row \d+"
    place = "the optimizer's step" if when == "optimizer" else batch
    helps = r"data\.batch_size .* gradient_checkpointing\.enabled: true.*"
    pattern = rf"Out of memory on cpu in {place}; the peak was \d+\.\d\d of \d+\.\d\d GiB\. What helps: {helps}"
    assert re.fullmatch(pattern, str(reported.value))
