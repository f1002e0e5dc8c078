"""The order of an epoch's rows, and which of them each rank takes."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class RankBatch(NamedTuple):
    """The rows of one micro-batch on one rank; a filler's row is only there to be run, its labels count nothing."""

    rows: list[int]
    filler: bool


def permute(n: int, *key: int | str) -> npt.NDArray[np.int64]:
    """Return a permutation of ``range(n)``, ``(n,)``: a pure function of its arguments, drawn from no global generator.

    Args:
        n: how many.
        key: what tells this permutation from all others: the seed, the epoch, what is permuted.
    """
    # Hashed rather than added: seed 1 in epoch 2 must not repeat seed 2 in epoch 1.
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    permutation: npt.NDArray[np.int64] = torch.randperm(n, generator=generator).numpy()
    return permutation


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch that takes each of ``n`` rows once."""
    order: list[int] = permute(n, seed, epoch).tolist()
    return order


def count_batches(n: int, batch_size: int, world_size: int) -> int:
    """Return how many micro-batches every rank has in an epoch of ``n`` rows."""
    return -(-n // (batch_size * world_size))


def rank_batches(order: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[RankBatch]:
    """Cut an order into micro-batches and return those of one rank.

    Micro-batch i of all ranks together is rows ``[i*b*w, (i+1)*b*w)``, so a window of the optimizer holds the same rows
    however many ranks share them. In a short last one the ranks share what is left, the first ones taking a row more; a
    rank that gets none runs a filler, so that every rank has the same number of micro-batches.
    """
    stride = batch_size * world_size
    batches = []
    for begin in range(0, len(order), stride):
        rows = order[begin : begin + stride]
        each, more = divmod(len(rows), world_size)
        first = rank * each + min(rank, more)
        mine = list(rows[first : first + each + (rank < more)])
        batches.append(RankBatch(mine or [rows[0]], not mine))
    return batches


def rank_bins(bins: Sequence[list[int]], rank: int, world_size: int) -> list[RankBatch]:
    """Return the bins of one rank, each a micro-batch: bin ``i*w + rank`` is its i-th.

    Where the last bins do not reach to all ranks, those without one run a filler.
    """
    batches = []
    for begin in range(0, len(bins), world_size):
        mine = begin + rank < len(bins)
        batches.append(RankBatch(bins[begin + rank] if mine else bins[begin][:1], not mine))
    return batches
