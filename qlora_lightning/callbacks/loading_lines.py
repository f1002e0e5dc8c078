"""The last lines of a fit: where the adapter is, and how plain PEFT loads it."""

import rich
from lightning import Callback, LightningModule, Trainer
from rich.markup import escape

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.model.adapter_folder import loading_snippet
from qlora_lightning.model.adapter_reading import read_identity
from qlora_lightning.trainer import is_trial_run


class LoadingLines(Callback):
    """Print the three lines that load the run's adapter folder without this package."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # after every on_fit_end
        if stage != "fit":
            return
        folder = AdapterCheckpoint.adapter_folder(trainer.default_root_dir)
        if trainer.is_global_zero and not is_trial_run(trainer) and (folder / "adapter_config.json").exists():
            rich.print(f"\nAdapter: [bold]{escape(str(folder))}[/bold]. To load it with plain PEFT:\n")
            print(loading_snippet(folder, read_identity(folder)))
