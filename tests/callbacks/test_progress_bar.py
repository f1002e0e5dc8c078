import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from qlora_lightning.callbacks.progress_bar import ShortProgressBar


class OneBatch:
    def __iter__(self):
        yield torch.zeros(1, 32)


class Logs(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("train_loss", 1.23456, prog_bar=True)
        self.log("tokens_per_second", 345.6, prog_bar=True)
        self.log("private_memory_gib", 1.239, prog_bar=True)
        self.log("mine", 2.0, prog_bar=True)
        return super().training_step(batch, batch_idx)


def test_names_and_numbers_are_short(tmp_path):
    bar = ShortProgressBar()
    model = Logs()
    trainer = Trainer(
        max_steps=1, callbacks=[bar], accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False,
        enable_model_summary=False, logger=False, limit_val_batches=0, log_every_n_steps=1, devices=1,
    )  # fmt: skip
    trainer.fit(model, train_dataloaders=OneBatch())
    assert bar.get_metrics(trainer, model) == {"loss": "1.235", "tok/s": "346", "GiB": "1.24", "mine": "2.000"}
