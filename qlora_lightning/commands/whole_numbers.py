"""Keeps 1 batch from being read as 1.0, all batches, by the Trainer's settings that take either."""

import functools
import operator
from typing import get_args

from lightning import Trainer


def read_whole_numbers_first() -> None:
    """Let whole numbers be tried before fractions where the Trainer takes both.

    jsonargparse tries the types of a union in their order. Python's typing keeps only one of ``Optional[Union[int,
    float]]`` and ``Optional[Union[float, int]]``, whichever a library made first, and forgets it after a while: which
    order the Trainer's own annotations have depends on what has been imported before it.
    """
    annotations = Trainer.__init__.__annotations__
    for name, annotation in annotations.items():
        kinds = get_args(annotation)
        if int in kinds and float in kinds:
            others = (kind for kind in kinds if kind is not int)
            annotations[name] = functools.reduce(operator.or_, others, int)  # which is made anew, in this order
