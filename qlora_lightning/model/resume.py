"""Goes on exactly where a run stopped: what a checkpoint holds beside tensors, and when it is put back."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.errors import UserError
from qlora_lightning.model.adapters import trainable_tensors
from qlora_lightning.model.generators import capture_generators, restore_generators

KEY = "qlora_lightning"  # our settings lie under our own key: under Lightning's they would beat the command line
FORMAT_VERSION = 1


class ExactResume(Callback):
    """Save and restore what Lightning does not: random generators, and the gradients of an open window.

    The module brings it along by ``configure_callbacks``. It is a callback, not hooks of the module, so that a
    subclass that overrides ``on_save_checkpoint`` without calling ``super()`` breaks nothing.
    """

    def __init__(self) -> None:
        self._content: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        settings = checkpoint.pop("hyper_parameters", {})
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "settings": dict(settings),
            "identity": dict(module.identity),
            "generators": capture_generators(),
            "window": module.window.state_dict(trainable_tensors(module)),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        module: Any = pl_module
        content = read_content(checkpoint, "The checkpoint")
        check_identity(content["identity"], module.identity, "The checkpoint")
        if trainer.state.fn == "fit":
            self._content = content

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._content is None:
            return
        module: Any = pl_module
        module.window.load_state_dict(self._content["window"], trainable_tensors(module))
        restore_generators(self._content["generators"])  # last: making loaders and iterators draws numbers too
        self._content = None


def read_content(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Give our part of a checkpoint.

    Raises:
        UserError: The checkpoint is foreign, or newer than this version can read.
    """
    content = checkpoint.get(KEY)
    if not isinstance(content, dict) or "format_version" not in content:
        raise UserError(f"{source} was not written by qlora_lightning: expected the key {KEY!r} in it.")
    version = content["format_version"]
    if version > FORMAT_VERSION:
        raise UserError(
            f"{source} has format version {version}, and this version of qlora_lightning reads up to {FORMAT_VERSION}: "
            "update qlora_lightning."
        )
    return content


def check_identity(stored: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter that was trained on another base: it would load without a word and answer nonsense.

    Raises:
        UserError: Fingerprint or quantization differ.
    """
    for name in ("fingerprint", "quantization"):
        if stored.get(name) and own.get(name) and stored[name] != own[name]:
            raise UserError(
                f"{source} was trained on another base: its {name} is {stored[name]} (base {stored.get('base')}), "
                f"this model's is {own[name]} (base {own.get('base')}). Set model.base and model.quantization to those "
                "that it was trained on."
            )
