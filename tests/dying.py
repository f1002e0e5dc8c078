"""Runs that end as on a machine that fails."""

import lightning


class MachineFailed(BaseException):
    """Not an Exception: nobody between who raises it and the test may handle it."""


class Stop(lightning.Callback):
    """Dies after so many micro-batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *_):
        self.left -= 1
        if not self.left:
            raise MachineFailed
