"""A step fits by itself: whatever goes through the model at a time, the adapter is the same."""

import re

import lightning
import pytest
import torch

from qlora_lightning import GradientCheckpointing, InstructionDataModule, QLoRAModule
from qlora_lightning.support.errors import UserError
from tests.steps import make_trainer


class Hungry(QLoRAModule):
    """Runs out of memory at the given passes, in forward or in the middle of backward, once each."""

    fails, where, passes = frozenset(), "backward", 0

    def compute_loss(self, batch):
        self.passes += 1
        fails = self.passes in self.fails
        if fails and self.where == "forward":
            self.run_out()
        if fails and torch.is_grad_enabled():
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self.hook = trained[len(trained) // 2].register_hook(lambda grad: self.hook.remove() or self.run_out())
        return super().compute_loss(batch)

    def run_out(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def train(base, file, tmp_path, *callbacks, fails=(), where="backward", batch_size=8, accumulate=1, **options):
    lightning.seed_everything(7, verbose=False)
    settings = {"rank": 4, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup_ratio": 0.0} | options
    module = Hungry(str(base), **settings)
    module.fails, module.where = frozenset(fails), where
    data = InstructionDataModule(str(file), val=str(file), tokenizer=str(base), batch_size=batch_size)
    trainer = make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[*callbacks])
    trainer.fit(module, data)
    adapter = torch.cat([each.detach().flatten() for each in module.parameters() if each.requires_grad])
    return module, adapter, trainer.callback_metrics


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    file = folder / "rows.jsonl"
    rows = [f'{{"instruction": "Say {n}.", "output": "{"word " * (1 + n % 5)}{n}"}}' for n in range(16)]
    file.write_text("\n".join(rows))
    return file, *train(tiny_base, file, folder)[1:]


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_tokens": 60},
        {"micro_batch_tokens": 1},
        {"fails": [2]},  # in the second step
        {"fails": [2, 3], "where": "forward"},  # and again
        {"batch_size": 4, "accumulate": 2, "fails": [4]},  # in the second batch of a window
        {"fails": [5], "where": "forward"},  # in a validation
    ],
    ids=str,
)
def test_parts_and_memory_that_runs_out_change_no_result(tiny_base, tmp_path, whole, options):
    file, adapter, metrics = whole
    module, same_adapter, same_metrics = train(tiny_base, file, tmp_path, **options)
    assert float((same_adapter - adapter).norm() / adapter.norm()) < 1e-5
    assert float(metrics["val_loss"]) == pytest.approx(float(same_metrics["val_loss"]), rel=1e-5)
    assert float(metrics["train_loss"]) == pytest.approx(float(same_metrics["train_loss"]), rel=1e-5)
    assert module.passes > 2 * len(module.fails) + 4


def test_a_row_that_does_not_fit_alone_is_checkpointed_and_then_named(tiny_base, tmp_path, whole, capsys):
    file, adapter, _ = whole
    options = {"micro_batch_tokens": 1, "where": "forward"}
    _, same_adapter, _ = train(tiny_base, file, tmp_path, GradientCheckpointing(), fails=[3], **options)
    assert float((same_adapter - adapter).norm() / adapter.norm()) < 1e-5
    out = capsys.readouterr().out
    assert re.search(r"Memory ran out in a row of \d+ tokens: gradient checkpointing is on from now on", out)
    with pytest.raises(UserError) as reported:
        train(tiny_base, file, tmp_path, GradientCheckpointing(False), fails=[3], **options)
    words = r"Out of memory on cpu in one row of \d+ tokens \(rows\.jsonl:\d+\): CUDA out of memory\."
    assert re.match(words, str(reported.value).replace(f"{file.parent}/", ""))
