"""Lets one process at a time train in a run folder."""

import errno
import os
from pathlib import Path

from qlora_lightning.callbacks.started_folder import CHECKPOINTS, writing_to
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.files import lock_folder

_held: set[int] = set()  # descriptors of this process


def _let_go_in_child() -> None:
    """Workers of a loader are forks: one that outlives a killed run would keep its folder locked."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class FolderLock:
    """An exclusive lock on a run's checkpoint folder itself, so no file is left behind; a kill releases it too."""

    def __init__(self) -> None:
        self._descriptor = -1

    def take(self, run_folder: str | Path) -> None:
        """Make the checkpoint folder and lock it, where its file system knows such locks (NFS does not for folders).

        Raises:
            UserError: The folder cannot be written to, or another process trains in it.
        """
        self.release()
        folder = Path(run_folder) / CHECKPOINTS
        with writing_to(run_folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            descriptor = lock_folder(folder)
        except BlockingIOError as error:
            raise UserError(
                f"A run is going on in {run_folder}: wait until it has ended, or name another folder by "
                "`--trainer.default_root_dir runs/NAME`."
            ) from error
        if descriptor is not None:
            self._descriptor = descriptor
            _held.add(descriptor)

    def release(self) -> None:
        """Let others in; nothing where nothing was taken."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1
