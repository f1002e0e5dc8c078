"""A checkpoint that was saved inside a step is rejected; others resume: ``tests/distributed/test_resume.py``."""

import lightning

from qlora_lightning import QLoRAModule
from tests.errors import rejects
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


def test_what_was_saved_inside_an_optimizer_step_is_rejected(tiny_base, rows_file, tmp_path):
    def train(max_steps, *callbacks, ckpt_path=None):
        options = {"max_steps": max_steps, "accumulate_grad_batches": 4, "callbacks": [*callbacks]}
        fit(QLoRAModule(str(tiny_base), rank=2), tmp_path, rows_file, ckpt_path=ckpt_path, **options)

    train(2, *(SaveAt(hook, tmp_path) for hook in HOOKS))
    for hook in HOOKS:
        with rejects("checkpoint.position"):
            train(6, ckpt_path=tmp_path / f"{hook}.ckpt")
