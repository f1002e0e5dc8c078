"""What cannot resume exactly is rejected.

That a resumed run ends as one that never stopped: ``tests/distributed/test_resume.py``.
"""

import lightning
import pytest

from qlora_lightning import AdapterCheckpoint, QLoRAModule, UserError
from tests.steps import fit


class SaveAt(lightning.Callback):
    """Saves a checkpoint at a hook, the second time that it comes."""

    def __init__(self, hook, folder):
        self.times, self.file = 0, folder / f"{hook}.ckpt"
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        self.times += 1
        if self.times == 2:
            trainer.save_checkpoint(self.file)


HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


def train(base, folder, rows, *callbacks, max_steps=2, ckpt_path=None, **settings):
    """Fit a module whose steps take four micro-batches."""
    options = {"max_steps": max_steps, "accumulate_grad_batches": 4, "enable_checkpointing": True}
    callbacks = [*callbacks, AdapterCheckpoint()]
    fit(QLoRAModule(str(base), rank=2, **settings), folder, rows, callbacks=callbacks, ckpt_path=ckpt_path, **options)


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory):
    """A folder with checkpoints of some hooks of a run, and its last one."""
    folder = tmp_path_factory.mktemp("saved")
    rows = "".join(f'{{"prompt": "Say {n}.", "completion": "{n}"}}\n' for n in range(16))
    (folder / "rows.jsonl").write_text(rows)
    train(tiny_base, folder, folder / "rows.jsonl", *(SaveAt(hook, folder) for hook in HOOKS))
    return folder


SGD = {"optimizer": "torch.optim.SGD"}


@pytest.mark.parametrize(
    ("checkpoint", "settings", "sentence"),
    [
        *((f"{hook}.ckpt", {}, "saved inside an optimizer step") for hook in HOOKS),
        ("checkpoints/last.ckpt", SGD, r"optimizer was torch\.optim\.adamw\.AdamW and is torch\.optim\.sgd\.SGD, "),
    ],
)
def test_what_cannot_resume_exactly_is_rejected(tiny_base, saved, tmp_path, checkpoint, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        train(tiny_base, tmp_path, saved / "rows.jsonl", max_steps=6, ckpt_path=saved / checkpoint, **settings)
