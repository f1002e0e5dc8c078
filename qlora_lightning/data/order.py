"""The order of an epoch's rows, and which of them each rank takes."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch


class RankBatch(NamedTuple):
    """The rows of one micro-batch on one rank; a filler's row is only there to be run, its labels count nothing."""

    rows: list[int]
    filler: bool


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return a permutation of ``range(n)``: a pure function of its arguments that draws from no global generator."""
    # Hashed rather than added: seed 1 in epoch 2 must not repeat seed 2 in epoch 1.
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(n, generator=generator).tolist()


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
