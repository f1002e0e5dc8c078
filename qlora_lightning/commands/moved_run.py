"""The config of a run that no longer lies where it says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.commands.config_files import find_configs
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import load_yaml

_OF_A_RUN = ("manifest.json", "checkpoints/last.ckpt", "adapter/adapter_config.json")


def refuse_moved_run(arguments: Sequence[str], run_folder: str | Path) -> None:
    """Refuse a run's own config where it names another folder than the one that it lies in.

    There would be no checkpoint and no adapter: ``fit`` would start anew, ``validate`` would judge the base.

    Args:
        arguments: Of the command line; its configs can be read.
        run_folder: ``trainer.default_root_dir``, wherever it was said.

    Raises:
        UserError: A config does.
    """
    for name in find_configs(arguments):
        config = Path(name).expanduser()
        lies_in = config.parent
        if config.name != "config.yaml" or not any((lies_in / each).exists() for each in _OF_A_RUN):
            continue
        says = _read_run_folder(config)
        if says is None or says != Path(run_folder).expanduser() or says.resolve() == lies_in.resolve():
            continue
        raise UserError(
            f"--config {name} is that of the run in {lies_in}, but says trainer.default_root_dir: {says}, which is "
            "another folder: the run was moved, or the current folder is another. Add "
            f"`--trainer.default_root_dir {lies_in}` to go on with that run, or name another to begin one."
        )


def _read_run_folder(config: Path) -> Path | None:
    settings: Any = load_yaml(config.read_text(encoding="utf-8"))
    trainer = settings.get("trainer") if isinstance(settings, dict) else None
    says = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
    return Path(says).expanduser() if isinstance(says, str) else None
