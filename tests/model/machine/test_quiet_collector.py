import contextlib
import gc

import lightning
import pytest

from qlora_lightning import InstructionDataModule, QLoRAModule


class Look(lightning.Callback):
    def __init__(self, fails):
        self.fails, self.frozen = fails, 0

    def on_train_batch_end(self, *args):
        self.frozen = gc.get_freeze_count()
        if self.fails:
            raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_objects_are_frozen_while_steps_are_taken_and_not_after(tiny_base, rows_file, fails, tmp_path):
    look = Look(fails)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[look],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    data = InstructionDataModule(train=str(rows_file), tokenizer=str(tiny_base))
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        trainer.fit(QLoRAModule(str(tiny_base)), data)
    assert look.frozen > 100_000
    assert gc.get_freeze_count() == 0
