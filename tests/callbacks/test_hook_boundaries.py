"""A checkpoint that anybody takes, at any boundary that a callback can see, resumes to the same end or is rejected."""

import functools

import lightning
import pytest
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule, ThroughputMonitor
from qlora_lightning.support.errors import UserError
from tests.equality import same

BOUNDARIES = [
    "on_train_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_end",
]
INSIDE = ["on_train_epoch_start", "on_before_optimizer_step"]
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


class Validated(lightning.Callback):
    """Remembers the loss of each validation, with its step."""

    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, pl_module):
        self.losses.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


class Taker(lightning.Callback):
    """Saves a checkpoint at every hook, and remembers which validations are behind it."""

    def __init__(self, folder, validated):
        self.folder, self.validated, self.taken = folder, validated, {}
        for hook in (*BOUNDARIES, *INSIDE):
            self.taken[hook] = []
            setattr(self, hook, functools.partial(self._take, hook))

    def _take(self, hook, trainer, *_):
        taken = self.taken[hook]
        file = self.folder / f"{hook}-{len(taken)}.ckpt"
        trainer.save_checkpoint(file)
        taken.append((file, trainer.global_step, len(self.validated.losses)))


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """Train with all that draws or changes rates; gives what a checkpoint of the end holds, and the validations."""
    folder = tmp_path_factory.mktemp("run")
    rows = [f'{{"instruction": "Count to {n}.", "output": "{" ".join(map(str, range(n)))}"}}\n' for n in range(1, 17)]
    (folder / "rows.jsonl").write_text("".join(rows))

    def run(validated, *callbacks, ckpt_path=None):
        lightning.seed_everything(7, verbose=False)
        settings = {"rank": 2, "learning_rate": 1e-2, "dropout": 0.1, "neftune_alpha": 5.0, "loraplus_ratio": 4.0}
        module = QLoRAModule(str(tiny_base), **settings)
        split = {name: str(folder / "rows.jsonl") for name in ("train", "val")}
        trainer = lightning.Trainer(
            # windows of 3, 3 and 2 batches; validations after the fourth and eighth: inside a window, and at the end
            **{"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 4, "limit_val_batches": 2},
            **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            default_root_dir=folder,
            callbacks=[validated, ThroughputMonitor(), *callbacks],
        )
        data = InstructionDataModule(**split, tokenizer=str(tiny_base), batch_size=2)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "end.ckpt")
        content = torch.load(folder / "end.ckpt", weights_only=True)
        return {part: content[part] for part in PARTS} | {"generators": content["qlora_lightning"]["generators"]}

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run that was never stopped: its end, its validations, and the checkpoints that were taken by each hook."""
    taker = Taker(tmp_path_factory.mktemp("taken"), Validated())
    return run(taker.validated, taker), taker.validated.losses, taker.taken


def assert_same_end(run, whole, hook, number):
    end, losses, taken = whole
    file, step, behind = taken[hook][number]
    later = Validated()
    found = run(later, ckpt_path=file)
    differs = [part for part in end if not same(found[part], end[part])]
    assert (differs, later.losses) == ([], losses[behind:]), f"{file.name}, step {step}, {behind} validations"


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_train_batch_end", 3),  # inside a window, with a validation due
        ("on_train_batch_end", 9),  # inside a window of the second epoch
        ("on_train_epoch_end", 0),
        ("on_validation_batch_end", 2),  # inside the validation at the end of an epoch
        ("on_validation_end", 0),
    ],
)
def test_a_checkpoint_of_a_boundary_resumes_to_the_same_end(run, whole, hook, number):
    assert_same_end(run, whole, hook, number)


@pytest.mark.slow
@pytest.mark.parametrize("hook", BOUNDARIES)
def test_every_checkpoint_of_every_boundary_resumes_to_the_same_end(run, whole, hook):
    assert whole[2][hook]
    for number in range(len(whole[2][hook])):
        assert_same_end(run, whole, hook, number)


@pytest.mark.parametrize("hook", INSIDE)
def test_a_checkpoint_of_the_inside_of_a_batch_is_rejected(run, whole, hook):
    file, *_ = whole[2][hook][-1]
    with pytest.raises(UserError, match="inside a batch or at the start of an epoch"):
        run(Validated(), ckpt_path=file)
