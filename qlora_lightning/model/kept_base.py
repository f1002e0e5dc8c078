"""Keeps one frozen base in memory for several trainings of a process, one after the other."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import peft

from qlora_lightning.model.adapters.lora import trainable_tensors


class KeptBase:
    """Holds the base of the training that has ended until the next one asks for the same."""

    def __init__(self) -> None:
        self._key: object = None
        self._lent: Any = None
        self._is_here = False

    def lend(self, key: object, load: Callable[[], Any]) -> Any:
        """Give the kept base where it was loaded by the same key, else load it.

        Args:
            key: Everything that the base depends on.
            load: Makes it: an object with the model in its attribute ``model``.
        """
        if not (self._is_here and self._key == key):
            self._lent = None  # or two bases would be in memory
            self._lent = load()
        self._key, self._is_here = key, False
        return self._lent

    def take_back(self, model: Any) -> bool:
        """Take the adapters off a model by PEFT's own means, and keep its base; gives whether it is kept.

        A model that is not PEFT's around the lent base, or whose base would train, is let go: the next one is loaded.

        Args:
            model: Of a training that has ended, which is not used any more.
        """
        self._is_here = False
        if isinstance(model, peft.PeftModel) and self._lent is not None:
            base = model.unload()
            if hasattr(base, "peft_config"):
                del base.peft_config  # PEFT would put a second adapter beside the first one's settings
            self._is_here = base is self._lent.model and not trainable_tensors(base)
        return self._is_here


_kept: ContextVar[KeptBase | None] = ContextVar("kept_base", default=None)


@contextlib.contextmanager
def keeping_base() -> Iterator[KeptBase]:
    """Let :func:`lend_base` ask the keeper that this gives, as long as it is open."""
    token = _kept.set(KeptBase())
    try:
        kept = _kept.get()
        assert kept is not None
        yield kept
    finally:
        _kept.reset(token)


def lend_base(key: object, load: Callable[[], Any]) -> Any:
    """Load a base, or have the kept one where :func:`keeping_base` is open; see :meth:`KeptBase.lend`."""
    kept = _kept.get()
    return load() if kept is None else kept.lend(key, load)
