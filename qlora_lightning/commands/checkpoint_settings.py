"""What neither command line nor config says on a resume is taken from the checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_lightning.model.adapter_state import read_checkpoint
from qlora_lightning.model.checkpoint_format import known_settings, read_content
from qlora_lightning.model.module import QLoRAModule

# A file must not decide that code which comes with a base may run.
_NEVER = {"trust_remote_code"}


def with_checkpoint_settings(arguments: Sequence[str], file: str | Path) -> list[str]:
    """Put the model's settings of a checkpoint in front of all configs, which then beat them one by one.

    Arguments of a subclass are not among them: a file that named a class would decide which code runs.

    Args:
        arguments: The command line, the command first.
        file: The checkpoint.

    Raises:
        UserError: The file is no checkpoint, or a foreign one.
    """
    settings = read_content(read_checkpoint(file, mmap=True), str(file))["settings"]
    usable = {name: settings[name] for name in sorted(settings.keys() & known_settings(QLoRAModule) - _NEVER)}
    return [arguments[0], "--config", json.dumps({"model": usable}), *arguments[1:]]
