"""Errors that libraries raise over what the user gave, as one sentence."""

import os
import re
import traceback
from pathlib import Path

from qlora_lightning.support.errors import UserError

# what jsonargparse makes of a class of the config that could not be made, where the setting may be of other types too
_NOT_MADE = re.compile(
    r"Union subtypes.*?\nErrors:\n  - (.*?)\n  - Expected .*?class_path='(lightning\.[\w.]+)'", re.DOTALL
)


def word_foreign_error(error: Exception) -> UserError | None:
    """Find or make the sentence for an error; None where it is a fault of the program, not of the user's.

    Args:
        error: what came out of the command: what a constructor of ours said, wrapped by jsonargparse in words of its
            own; a file that is no text; a seed that is no number; a logger without its package; or a setting that
            Lightning does not take.
    """
    own = find_user_error(error)
    if own is not None:
        return own
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"The config is not text in UTF-8: {error.reason} at byte {error.start}.")
    if "PL_GLOBAL_SEED" in str(error):
        seed = os.environ.get("PL_GLOBAL_SEED")
        return UserError(f"The environment variable PL_GLOBAL_SEED is {seed}: expected an integer.")
    not_made = _NOT_MADE.search(str(error))
    if not_made:
        reason = " ".join(not_made[1].split()).removeprefix(f"Problem with given class_path '{not_made[2]}': ")
        return UserError(f"{not_made[2]} could not be made: {reason}")
    frames = traceback.extract_tb(error.__traceback__)
    if frames and "lightning/pytorch/" in Path(frames[-1].filename).as_posix():
        return UserError(f"trainer: {' '.join(str(error).split())}")
    return None


def find_user_error(error: BaseException | None) -> UserError | None:
    """Find what a constructor of ours said, which jsonargparse wraps in words of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error
