"""A LightningModule whose state is its adapter: what it saves, loads, and is made again from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning
import torch
from lightning import Callback

from qlora_lightning.model.adapter_folder import save_adapter_folder
from qlora_lightning.model.adapters import all_names_of_trainable_tensors, copy_tensors, trainable_tensors
from qlora_lightning.model.resume import ExactResume, check_identity, read_content
from qlora_lightning.model.window import Window


class LoadedKeys(NamedTuple):
    """What torch's ``load_state_dict`` returns; both stay empty, since a misfit is an error here."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdapterStateModule(lightning.LightningModule):
    """Saves and loads what trains, and nothing of the base; Lightning would write the whole model.

    Attributes:
        model: The base with its adapter, ``None`` until ``configure_model`` has made it.
        identity: What the base was: name, fingerprint, quantization.
        window: The accumulation window in progress.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None
        self.identity: dict[str, Any] = {}
        self.window = Window()
        self.strict_loading = True

    def configure_callbacks(self) -> list[Callback]:
        return [ExactResume()]

    def save_adapter(self, folder: str | Path, tokenizer: Any = None, stop_ids: Sequence[int] = ()) -> None:
        """Write the adapter folder: PEFT's files, the tokenizer with its chat template, and what the base was.

        Args:
            folder: Where to.
            tokenizer: Saved beside.
            stop_ids: A data module's: tokens at which generation stops, beside the tokenizer's and the base's own.
        """
        tensors = all_names_of_trainable_tensors(self.model)
        save_adapter_folder(Path(folder), self.model, tensors, tokenizer, self.identity, stop_ids)

    def state_dict(  # type: ignore[override]  # torch's overloads, in one signature
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Give the adapter's tensors only; the base, large and frozen, is never walked but made anew from its name."""
        destination = {} if destination is None else destination
        for name, tensor in trainable_tensors(self).items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        return destination

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Set the adapter's tensors; always strict: every one must be there with its shape, and no other."""
        self.configure_model()
        copy_tensors(self, state_dict, "The checkpoint")
        return LoadedKeys([], [])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # our settings lie under our own key, and no hparams file exists
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", **overrides: Any
    ) -> Self:
        """Make a module from a checkpoint: settings, base and adapter. ``overrides`` replace saved settings.

        Raises:
            UserError: The checkpoint is foreign, or belongs to another base.
        """
        checkpoint = torch.load(checkpoint_path, map_location=map_location, weights_only=True)
        content = read_content(checkpoint, str(checkpoint_path))
        module = cls(**{**content["settings"], **overrides})
        module.to(map_location)
        module.configure_model()
        check_identity(content["identity"], module.identity, str(checkpoint_path))
        module.load_state_dict(checkpoint["state_dict"])
        return module
