"""Checkpoint files: their content, how to read them, and how to build a module from one without a Trainer."""

import contextlib
import inspect
import json
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError, explaining
from qlora_lightning.support.files import check_keys, check_version

KEY = "qlora_lightning"  # our settings have their own key: under Lightning's, they would override the command line
_NOT_READ = (
    "{} cannot be read: it is damaged or not a checkpoint, or it holds objects that run code when they are loaded. "
    "Expected a .ckpt file that a run wrote, with only tensors, numbers and texts"
)
_STATES = list[dict[str, object]]
_KEYS: dict[str, Any] = {
    **{"pytorch-lightning_version": str, "epoch": int, "global_step": int, "state_dict": dict[str, torch.Tensor]},
    **{"loops": {"fit_loop": dict}, "callbacks": dict, "optimizer_states": _STATES, "lr_schedulers": _STATES},
    KEY: {
        **{"settings": dict, "optimizers": list[str], "micro_batch_size": _STATES, "generators": _STATES},
        **{"trainer": {"accumulate_grad_batches": int}, "monitored": dict, "groups": _STATES | None},
        "loss_scale": {"value": float, "finite": int, "skipped": int},
        "identity": {"adapter": dict | None, "data": {"settings": dict | None, "samples": dict | None}},
    },
}


def read_checkpoint(file: str | Path, mmap: bool = False, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU; raise UserError if it is missing, damaged, or would run code.

    The entire file is read to verify its checksums. Without ``weights_only``, it may run code.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: there is no such file. Expected a .ckpt file that a run wrote.", "checkpoint.missing")
    with explaining(_NOT_READ.format(file), "checkpoint.damaged"):
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type for member in archive.infolist()):  # a small file may unpack to many GB
                raise zipfile.BadZipFile("it is compressed")
            if archive.testzip():  # torch does not verify checksums
                raise zipfile.BadZipFile
        checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=mmap)
    return checkpoint if isinstance(checkpoint, dict) else {}


class CheckpointReader(TorchCheckpointIO):
    """Read the file in ``ckpt_path`` for a Trainer; Lightning checks neither its checksums nor who wrote it."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        weights_only = weights_only is not False  # only the user can turn it off
        if "://" in str(path):
            with explaining(_NOT_READ.format(path), "checkpoint.damaged"):
                checkpoint = super().load_checkpoint(path, weights_only=weights_only)
        else:
            checkpoint = read_checkpoint(path, weights_only=weights_only)
        read_content(checkpoint, str(path))
        return checkpoint


def read_content(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return our part of a checkpoint; raise UserError if it is foreign or too new."""
    content = checkpoint.get(KEY)
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise UserError(
            f"{source} was not written by qlora_lightning: expected the key {KEY!r} in it. Lightning's ModelCheckpoint "
            "leaves it out with save_weights_only=True.",
            "checkpoint.foreign",
        )
    check_version(content["format_version"], source)
    check_keys(checkpoint, _KEYS, source, "Take another checkpoint.")
    return content


def usable_settings(stored: Mapping[str, Any], known: Collection[str], owner: str) -> dict[str, Any]:
    """Return the stored settings that the class ``owner`` accepts, without those that a file must not decide."""
    excluded = {"trust_remote_code"}
    if unknown := sorted(stored.keys() - known):
        say(f"Ignored settings of the checkpoint, which {owner} does not know: {', '.join(unknown)}.")
    optimizer = stored.get("optimizer")
    class_path = str(optimizer.get("class_path") if isinstance(optimizer, Mapping) else optimizer or "torch.optim.")
    if not class_path.startswith(("torch.optim.", "bitsandbytes.optim.")):  # any other could import foreign code
        say(f"The checkpoint's optimizer {class_path} is not used: a file must not choose which code runs.")
        excluded.add("optimizer")
    return {name: stored[name] for name in sorted((stored.keys() & known) - excluded)}


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that ``torch.load(weights_only=True)`` can read, without a subclass's other arguments."""
    plain = {}
    for name, value in settings.items():
        with contextlib.suppress(TypeError):
            plain[name] = json.loads(json.dumps(value, default=os.fspath))
    return plain


def restore_module(kind: type, file: str | Path, map_location: Any, overrides: dict[str, Any]) -> Any:
    """Build a module of class ``kind`` from a checkpoint's settings, base and adapter.

    Raises:
        UserError: If the file is not a checkpoint, was written by another tool, or belongs to another base.
    """
    checkpoint = read_checkpoint(file)
    content = read_content(checkpoint, str(file))
    parameters = inspect.signature(kind).parameters
    takes_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = content["settings"] if takes_kwargs else parameters
    settings = {**usable_settings(content["settings"], accepted, kind.__name__), **overrides}
    optional = {name for name, parameter in parameters.items() if parameter.default is not parameter.empty}
    if missing := sorted(optional - content["settings"].keys() - overrides.keys()):
        say(f"Arguments of {kind.__name__} that are not in the checkpoint keep their defaults: {', '.join(missing)}.")
    module: Any = kind(**settings)
    module.to(map_location)
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module
