"""What a checkpoint holds."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import check_version

KEY = "qlora_lightning"  # our settings lie under our own key: under Lightning's they would beat the command line

# What a run cannot go on exactly without: Lightning's parts of a checkpoint, and those of ours.
PARTS = (
    "pytorch-lightning_version",
    "state_dict",
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "callbacks",
    "global_step",
)
OWN_PARTS = ("identity", "generators", "window")

_OPTIMIZERS = ("torch.optim", "bitsandbytes.optim")


def read_content(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Give our part of a checkpoint. Keys that are merely new are read with a default.

    Args:
        checkpoint: What ``torch.load`` gives.
        source: Its name, for the message.

    Raises:
        UserError: The checkpoint is foreign, newer than this version can read, or lacks a part.
    """
    content = checkpoint.get(KEY)
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(version, int):
        if "optimizer_states" not in checkpoint and any(".lora_" in name for name in checkpoint.get("state_dict", ())):
            raise UserError(
                f"{source} holds the tensors of an adapter and nothing else of its run, as Lightning's ModelCheckpoint "
                "writes with save_weights_only=True: expected a checkpoint of AdapterCheckpoint, such as last.ckpt."
            )
        raise UserError(f"{source} was not written by qlora_lightning: expected the key {KEY!r} in it.")
    check_version(version, source)
    missing = [name for name in PARTS if name not in checkpoint]
    missing += [f"{KEY}.{name}" for name in OWN_PARTS if name not in content]
    if missing:
        raise UserError(
            f"{source} lacks {', '.join(missing)}, which every checkpoint of a run holds: something else has changed "
            "it. Take another."
        )
    return {**content, "settings": dict(content.get("settings", {}))}


def find_foreign_class(settings: Mapping[str, Any]) -> str | None:
    """Name the optimizer's class among stored settings where it is neither torch's nor bitsandbytes'.

    To use it would import its module: a file would decide which code runs.
    """
    choice = settings.get("optimizer")
    path = choice.get("class_path") if isinstance(choice, Mapping) else choice
    module = str(path).rpartition(".")[0]
    known = path is None or any(module == home or module.startswith(f"{home}.") for home in _OPTIMIZERS)
    return None if known else str(path)


def known_settings(cls: type) -> set[str]:
    """Name the arguments of a class, with those of its base classes that it hands on by ``**kwargs``."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what ``torch.load(weights_only=True)`` will read again; a subclass may take arguments of any kind."""
    return {name: _plain(value) for name, value in settings.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Path | Tensor)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


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


def usable_settings(cls: type, stored: dict[str, Any]) -> dict[str, Any]:
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
