"""Where ``evaluate`` is to write, tried before a second is spent."""

import itertools
import tempfile

from qlora_lightning.commands.evaluate.options import Options
from qlora_lightning.support.errors import UserError


def check_targets(options: Options, force: bool) -> None:
    """See that every file can be written, and that nothing is lost; nothing is left of the trial.

    Args:
        options: Of the command.
        force: Whether earlier results in ``--out`` may be written over.

    Raises:
        UserError: A file cannot be written, or is there already.
    """
    out = options.out
    if out is None:
        return
    nearest = next(place for place in itertools.chain([out], out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {out}: {'that' if nearest == out else nearest} is a file; name a folder.")
    for file in options.files():
        if file.is_dir():
            raise UserError(f"--out {out}: {file} is a folder, and a file of that name would be written. Name another.")
        if file.exists() and not force:
            raise UserError(f"{file} is there already: name another folder in --out, or overwrite it with --force.")
    try:
        with tempfile.NamedTemporaryFile(prefix=".evaluate-", dir=nearest):  # the disk may be read-only
            return
    except OSError as error:
        raise UserError(f"--out {out}: nothing can be written there ({error.strerror}).") from error
