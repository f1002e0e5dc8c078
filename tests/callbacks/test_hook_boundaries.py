"""A checkpoint that anybody takes, at any boundary that a callback can see, goes on to the same end or is refused."""

import lightning
import pytest
import torch

from qlora_lightning import ThroughputMonitor
from qlora_lightning.support.errors import UserError
from tests.equality import same

# windows of 3, 3 and 2 batches; validations after the fourth and eighth: inside a window, and at the epoch's end
OPTIONS = {"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 4, "limit_val_batches": 2}
OFTEN = ["on_validation_batch_end", "on_train_epoch_end"]
SELDOM = [
    "on_train_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_end",
]
EXACT = [*OFTEN, *(pytest.param(hook, marks=pytest.mark.slow) for hook in SELDOM)]
INSIDE = ["on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_before_optimizer_step"]


class Validated(lightning.Callback):
    """Remembers the loss of each validation, with its step."""

    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, pl_module):
        self.losses.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


class Taker(lightning.Callback):
    """Saves a checkpoint each time that one hook is called, and remembers which validations lie behind it."""

    def __init__(self, hook, folder, validated):
        self.folder, self.validated, self.taken = folder, validated, []
        setattr(self, hook, self._take)

    def _take(self, trainer, pl_module, *_):
        file = self.folder / f"{len(self.taken)}.ckpt"
        trainer.save_checkpoint(file)
        self.taken.append((file, trainer.global_step, len(self.validated.losses)))


@pytest.fixture
def run(fit, make_module, tmp_path):
    """Train; gives what a checkpoint of the end holds, and the validations."""

    def run(validated, *callbacks, **more):
        module = make_module(dropout=0.1, schedule="cosine")
        trainer, module = fit(validated, ThroughputMonitor(), *callbacks, module=module, **OPTIONS, **more)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        content = torch.load(tmp_path / "end.ckpt", weights_only=True)
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
        return {part: content[part] for part in parts} | {"generators": content["qlora_lightning"]["generators"]}

    return run


@pytest.mark.parametrize("hook", EXACT)
def test_a_checkpoint_of_a_boundary_goes_on_to_the_same_end(run, tmp_path, hook):
    validated = Validated()
    taker = Taker(hook, tmp_path, validated)
    whole = run(validated, taker)
    assert taker.taken
    wrong = []
    for file, step, behind in taker.taken:
        later = Validated()
        end = run(later, ckpt_path=file)
        differs = [part for part in whole if not same(end[part], whole[part])]
        if differs or later.losses != validated.losses[behind:]:
            wrong.append(f"{file.name}, step {step}, {behind} validations: {differs}, {later.losses}")
    assert not wrong, "\n".join([*wrong, f"in the whole run: {validated.losses}"])


def test_a_checkpoint_of_the_inside_of_a_batch_is_refused_as_one_to_go_on_from(run, tmp_path):
    validated = Validated()
    takers = []
    for hook in INSIDE:
        (tmp_path / hook).mkdir()
        takers.append(Taker(hook, tmp_path / hook, validated))
    run(validated, *takers)
    for taker in takers:
        file, *_ = taker.taken[-1]
        with pytest.raises(UserError, match="inside a batch or at the start of an epoch"):
            run(Validated(), ckpt_path=file)
