"""Whether functions whose work a fused forward does itself are still those of the libraries."""

import os
import sys
from collections.abc import Iterator
from typing import Any

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class Originals:
    """Functions of libraries, as they were when this was made: before or after, others may put theirs there.

    Libraries of kernels do so, for all models at once.
    """

    def __init__(self, *places: tuple[Any, str]) -> None:
        """Look at them.

        Args:
            places: Of each function the class or module that holds it, and its name there.
        """
        self._found = [(vars(owner), name, getattr(owner, name)) for owner, name in places]
        self._are_own = all(_is_own(function) for _, _, function in self._found)

    def are_there(self) -> bool:
        """Whether each is the library's own."""
        # in a loop: every layer asks in every pass
        for names, name, function in self._found:
            if names.get(name) is not function:
                return False
        return self._are_own


def _is_own(function: Any) -> bool:
    folders = tuple(os.path.join(os.path.dirname(str(sys.modules[each].__file__)), "") for each in _LIBRARIES)
    return all(file.startswith(folders) for file in _files(function))


def _files(function: Any) -> Iterator[str]:
    """Give where a function is written, and each that it wraps: ``functools.wraps`` copies all names but not that."""
    while function is not None:
        yield getattr(getattr(function, "__code__", None), "co_filename", "")
        function = getattr(function, "__wrapped__", None)
