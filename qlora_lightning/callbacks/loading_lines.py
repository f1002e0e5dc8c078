"""The last lines of a fit: where the adapter is, and how plain PEFT loads it."""

import json

import rich
from lightning import Callback, LightningModule, Trainer
from rich.markup import escape

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.model.adapters.folder import loading_snippet
from qlora_lightning.support.trainer import is_trial_run


class LoadingLines(Callback):
    """Print the three lines that load the run's adapter folder without this package."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # after every on_fit_end
        if stage != "fit":
            return
        folder = AdapterCheckpoint.adapter_folder(trainer.default_root_dir)
        identity = folder / "qlora_lightning.json"
        if trainer.is_global_zero and not is_trial_run(trainer) and identity.exists():
            rich.print(f"\nAdapter: [bold]{escape(str(folder))}[/bold]. To load it with plain PEFT:\n")
            # Not read_identity, which is for who builds on it: a build_model may have made another kind than LoRA.
            print(loading_snippet(folder, json.loads(identity.read_text(encoding="utf-8"))))
