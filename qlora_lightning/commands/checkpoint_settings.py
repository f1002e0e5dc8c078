"""What neither command line nor config says on a resume is taken from the checkpoint."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.model.checkpoint.format import find_foreign_class, read_checkpoint, read_content, usable_settings
from qlora_lightning.model.module import QLoRAModule
from qlora_lightning.support.errors import UserError


def with_checkpoint_settings(arguments: Sequence[str], file: str | Path, own: Mapping[str, Any]) -> list[str]:
    """Put the model's settings of a checkpoint in front of all configs, which then beat them one by one.

    Arguments of a subclass are not among them: a file that named a class would decide which code runs. An optimizer
    is, if it is torch's or bitsandbytes' own.

    Args:
        arguments: The command line, the command first.
        file: The checkpoint.
        own: The model's settings as configs and command line give them.

    Raises:
        UserError: The file is no checkpoint, or a foreign one, or only it names an optimizer from elsewhere.
    """
    settings = read_content(read_checkpoint(file, mmap=True), str(file))["settings"]
    foreign = find_foreign_class(settings)
    if foreign is not None and own.get("optimizer") is None:
        raise UserError(
            f"{file} names the optimizer {foreign}, and a file must not decide which module is imported: if you "
            f"trust it, name it yourself by `--model.optimizer {foreign}`."
        )
    usable = usable_settings(QLoRAModule, settings)
    return [arguments[0], "--config", json.dumps({"model": usable}), *arguments[1:]]
