"""A LightningModule whose state is its adapter: what it saves, loads, and is made again from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning
import torch
from lightning import Callback

from qlora_lightning.base.cache import EntryCheck
from qlora_lightning.model.adapters.folder import save_adapter_folder
from qlora_lightning.model.adapters.identity import check_identity, identity_of_data
from qlora_lightning.model.adapters.lora import all_names_of_trainable_tensors, copy_tensors, trainable_tensors
from qlora_lightning.model.checkpoint.format import find_foreign_class, known_settings, read_content
from qlora_lightning.model.checkpoint.resume import ExactResume
from qlora_lightning.model.window import Window
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError


class LoadedKeys(NamedTuple):
    """What torch's ``load_state_dict`` returns; both stay empty, since a misfit is an error here."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdapterStateModule(lightning.LightningModule):
    """Saves and loads what trains, and nothing of the base; Lightning would write the whole model.

    Attributes:
        model: The base with its adapter, ``None`` until ``configure_model`` has made it.
        identity: What the adapter belongs to: the base's name, fingerprint, config and quantization, its own shape.
        window: The accumulation window in progress.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None
        self.identity: dict[str, Any] = {}
        self.window = Window()
        self.strict_loading = True
        self._base_check: EntryCheck | None = None

    def configure_callbacks(self) -> list[Callback]:
        return [ExactResume()]

    def check_base(self, wait: bool = True) -> None:
        """Refuse a base that is not what was cached; called before anything of a fit is saved.

        Args:
            wait: Whether to wait for the result; else only one that is known counts.

        Raises:
            UserError: It is damaged.
        """
        if self._base_check is not None and (wait or self._base_check.is_done):
            self._base_check.wait()
            self._base_check = None

    def save_adapter(self, folder: str | Path, tokenizer: Any = None, stop_ids: Sequence[int] = ()) -> None:
        """Write the adapter folder: PEFT's files, the tokenizer with its chat template, and what it belongs to.

        Args:
            folder: Where to.
            tokenizer: Saved beside.
            stop_ids: A data module's: tokens at which generation stops, beside the tokenizer's and the base's own.
        """
        self.check_base()
        tensors = all_names_of_trainable_tensors(self.model)
        data = identity_of_data(self._trainer)
        identity = {**self.identity, "data": data} if data else self.identity
        save_adapter_folder(Path(folder), self.model, tensors, tokenizer, identity, stop_ids)

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look before the tensors are set whether they belong here: a misfit of shapes is better told by its cause."""
        check_identity(read_content(checkpoint, "The checkpoint")["identity"], self.identity, "The checkpoint")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # our settings lie under our own key, and no hparams file exists
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", *, strict_identity: bool = True, **overrides: Any
    ) -> Self:
        """Make a module from a checkpoint: settings, base and adapter.

        Whether code that comes with the base may run is not taken from the checkpoint: pass ``trust_remote_code``.

        Args:
            checkpoint_path: A file that a run wrote.
            map_location: Where the module shall live.
            strict_identity: ``False`` puts the adapter on another base too, if its tensors fit, and says what differs.
            overrides: Arguments of the module that replace saved ones.

        Raises:
            UserError: The file is no checkpoint or a foreign one, or belongs to another base.
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        content = read_content(checkpoint, str(checkpoint_path))
        module = cls(**{**_usable_settings(cls, content["settings"]), **overrides})
        module.to(map_location)
        module.configure_model()
        try:
            check_identity(content["identity"], module.identity, str(checkpoint_path))
        except UserError as error:
            if strict_identity:
                raise
            say(f"Loaded all the same, as strict_identity is False: {error}")
        module.load_state_dict(checkpoint["state_dict"])
        return module


def read_checkpoint(file: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file without running any code in it.

    Args:
        file: Its path.
        map_location: Where its tensors shall live.
        mmap: Read tensors only when they are used.

    Raises:
        UserError: The file is not there, cut off, or no checkpoint.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: there is no such file. Expected a .ckpt file that a run wrote.")
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch has no exception of its own for a file that it cannot read
        raise UserError(f"{file} is no checkpoint, or it is cut off: {type(error).__name__}.") from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def _usable_settings(cls: type, stored: dict[str, Any]) -> dict[str, Any]:
    """Leave out what this version does not know, and what a file must not decide."""
    known = known_settings(cls)
    unknown = sorted(stored.keys() - known)
    if unknown:
        say(f"Settings of the checkpoint that this version does not know, ignored: {', '.join(unknown)}.")
    never = {"trust_remote_code"}
    if foreign := find_foreign_class(stored):
        say(f"The checkpoint's optimizer {foreign} is not taken over: a file must not choose which code runs.")
        never.add("optimizer")
    return {name: value for name, value in stored.items() if name in known - never}
