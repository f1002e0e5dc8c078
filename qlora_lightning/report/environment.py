"""What a run ran with: versions of packages, the state of the code's repository, the processor."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("qlora-lightning", "torch", "lightning", "transformers", "peft", "bitsandbytes", "tokenizers", "datasets"),
    *("accelerate", "safetensors", "torchmetrics", "numpy"),
)
_SECONDS = 5  # for git: a repository on a slow disk holds no run up


def package_versions() -> dict[str, str]:
    """Give the versions of the packages that decide what is computed, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Give commit, branch, and whether tracked files were changed; ``None`` outside a repository or without git."""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    changes = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "branch": _ask_git(folder, "branch", "--show-current") or None, "dirty": bool(changes)}


def processor_name() -> str:
    """Name the processor as its maker does, where the system tells it."""
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _ask_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
