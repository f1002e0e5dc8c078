"""Whether samples begin and end as generation needs it: stop tokens and BOS, in words."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from qlora_lightning.data.samples import SampleSet


class Ends(NamedTuple):
    """Counts over the samples of a split.

    Attributes:
        samples: all of them.
        stopping: samples with a stop token among their labelled tokens.
        with_bos: samples that begin with the tokenizer's BOS; None if it has none.
        doubled: samples that begin with it twice.
    """

    samples: int
    stopping: int
    with_bos: int | None
    doubled: int


def count_ends(samples: SampleSet, stop_ids: Collection[int], bos_id: int | None) -> Ends:
    """Look at every sample of a ``SampleSet``."""
    starts, ids, number = samples.starts, samples.ids, len(samples)
    stops = np.flatnonzero(np.isin(ids, list(stop_ids)) & samples.labelled)
    stopping = len(np.unique(np.searchsorted(starts, stops, side="right")))
    if bos_id is None:
        return Ends(number, stopping, None, 0)
    begins = ids[starts[:-1]] == bos_id
    begins |= np.diff(samples.row_ids, prepend=-1) == 0  # of a row that was split only the first piece has one
    longer = np.diff(starts) > 1
    doubled = begins & longer & (ids[np.minimum(starts[:-1] + 1, max(0, len(ids) - 1))] == bos_id)
    return Ends(number, stopping, int(begins.sum()), int(doubled.sum()))


def word_ends(ends: Ends, tokenizer: Any, stop_ids: Collection[int]) -> list[tuple[bool, str]]:
    """Say in a sentence each, with whether it is well: the stop token, then the BOS."""
    stops = " or ".join(f"{tokenizer.decode([number])} ({number})" for number in sorted(stop_ids))
    if ends.stopping == ends.samples:
        stop = (True, f"Stop token {stops}: every sample trains one.")
    else:
        without = ends.samples - ends.stopping
        found = "no sample trains" if not ends.stopping else f"{without:,} of {ends.samples:,} samples do not train"
        stop = (
            False,
            f"Stop token {stops}: {found} one (an answer that was cut, or a piece before its end, has none).",
        )
    if ends.with_bos is None:
        return [stop, (True, "BOS: this tokenizer has none.")]
    name = f"BOS {tokenizer.bos_token} ({tokenizer.bos_token_id})"
    if ends.doubled:
        return [stop, (False, f"{name}: {ends.doubled:,} of {ends.samples:,} samples begin with two.")]
    if ends.with_bos == ends.samples:
        return [stop, (True, f"{name}: every sample begins with exactly one.")]
    if not ends.with_bos:
        return [stop, (True, f"{name}: no sample begins with it; the chat template writes none.")]
    return [stop, (False, f"{name}: {ends.with_bos:,} of {ends.samples:,} samples begin with one.")]
