"""Rows packed into bins of a token budget, best fit first."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Numbers = Sequence[int] | npt.NDArray[Any]


def best_fit(lengths: _Numbers, order: _Numbers, budget: int) -> list[list[int]]:
    """Pack rows into bins, from the longest to the shortest, each where it leaves the least room.

    Rows of one length take their turn as they stand in ``order``, so that another order makes other bins. How many
    bins it takes depends on the lengths alone.

    Args:
        lengths: tokens of every row.
        order: the rows to pack; one that occurs twice is packed twice.
        budget: tokens that fit into a bin; at least those of the longest row.

    Returns:
        The rows of each bin, the bin with the longest row first.
    """
    chosen = np.asarray(order, dtype=np.int64)
    sizes = np.asarray(lengths)[chosen]
    falling = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]  # bins by the room left in them
    rooms = 0  # bit r is set where with_room[r] is not empty: the least room that will do is one bit scan away
    for row, size in zip(chosen[falling].tolist(), sizes[falling].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            bins[number].append(row)
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = budget, len(bins)
            bins.append([row])
        with_room[room - size].append(number)
        rooms |= 1 << (room - size)
    return bins


def make_count(bins: list[list[int]], lengths: _Numbers, count: int) -> list[list[int]]:
    """Return ``count`` bins, at most as many as rows: the emptiest are left out, or those with most rows cut in two."""
    if len(bins) > count:
        sizes = np.asarray(lengths)
        fill = np.array([sizes[rows].sum() for rows in bins])
        kept = np.sort(np.argsort(-fill, kind="stable")[:count])
        return [bins[number] for number in kept.tolist()]
    bins = list(bins)
    while len(bins) < count:
        number = max(range(len(bins)), key=lambda n: len(bins[n]))
        rows = bins[number]
        bins[number] = rows[::2]
        bins.append(rows[1::2])
    return bins
