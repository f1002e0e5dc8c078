"""Where an adapter folder lies, and the config of the run that wrote it; read by whoever is given such a folder."""

from pathlib import Path


def find_adapter_folder(named: str | Path) -> Path:
    """Give the adapter folder itself where the run folder around it was named; any other folder as it is."""
    folder = Path(named).expanduser()
    inner = folder / "adapter"
    is_run = not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file()
    return inner if is_run else folder


def find_run_config(adapter: Path) -> Path | None:
    """Give the ``config.yaml`` of the run folder around an adapter folder, where there is one."""
    beside = adapter.absolute().parent / "config.yaml"
    return beside if beside.is_file() else None
