"""Takes down what is warned of during a run, for its report; the warnings themselves go where they always go."""

import logging
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

from lightning import Callback, Trainer

from qlora_lightning.support.trainer import callbacks_of

_MOST = 100  # different ones: a report is read by people
_LONGEST = 600  # characters of one


class RunWarnings:
    """Counts warnings by their text: Python's, those of every logger, and those that callbacks tell of.

    No handler is added to a logger: that would take Python's own last resort away, and silence it.

    Attributes:
        counts: How often each text came, in the order in which they came first.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._stop: Callable[[], None] | None = None

    def note(self, text: str) -> None:
        """Take one down."""
        text = textwrap.shorten(text, _LONGEST, placeholder=" …")
        if text in self.counts or len(self.counts) < _MOST:
            self.counts[text] = self.counts.get(text, 0) + 1

    def listen(self) -> None:
        """Begin to take down what is warned of in this process."""
        self.stop()
        show, make = warnings.showwarning, logging.getLogRecordFactory()

        def show_and_note(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            self.note(f"{category.__name__}: {message}")
            show(message, category, *args, **kwargs)

        def make_and_note(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = make(*args, **kwargs)
            if record.levelno >= logging.WARNING and record.name != "py.warnings":
                self.note(_text_of(record))
            return record

        def stop() -> None:
            if warnings.showwarning is show_and_note:  # else somebody has put a third one over it
                warnings.showwarning = show
            if logging.getLogRecordFactory() is make_and_note:
                logging.setLogRecordFactory(make)

        warnings.showwarning = show_and_note
        logging.setLogRecordFactory(make_and_note)
        self._stop = stop

    def stop(self) -> None:
        """Let go of both again."""
        if self._stop is not None:
            self._stop()
            self._stop = None


class TakesWarnings(Callback):
    """A callback that keeps the warnings of a run."""

    warnings: RunWarnings


def note_warning(trainer: Trainer, text: str) -> None:
    """Tell the callback that keeps the warnings of a run, if there is one, of a warning that was printed."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, TakesWarnings):
            callback.warnings.note(text)


def _text_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):  # logging itself will say that format and arguments do not agree
        return str(record.msg)
