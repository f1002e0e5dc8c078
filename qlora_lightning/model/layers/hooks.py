"""Whether parts that a fused forward skips are as the libraries made them, and unwatched."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run an autograd function."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


# torch has no public way to ask
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def is_watched(module: nn.Module) -> bool:
    """Whether the module, or one inside it, has hooks or a forward of its own, or all modules have hooks."""
    inside: list[nn.Module | None] = [module]
    for each in inside:  # grows on the way: every layer asks in every pass, and modules() takes four times as long
        if each is not None:
            own = each.__dict__  # quicker than to ask the module
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return True
            inside += own["_modules"].values()
    return any(getattr(global_hooks, kind) for kind in _GLOBAL)


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
