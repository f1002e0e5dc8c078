"""How the rows and keys of short samples lie in tiles: index arithmetic, once for all layers of a batch.

Tile i of a sample holds its tokens from ``i · TILE`` on and sees the keys up to its end; over all samples that have a
token of their own in it, it is one batched product. What a sample begins with may be computed with another one: then it
has keys there, and no queries.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lightning.model.layers.whole_samples import sort_by_place

TILE = 64  # tokens: shorter ones make more products than they save, longer ones more scores behind the diagonal


class Tile(NamedTuple):
    """One tile of all samples with a token of their own in it: how many, and how many keys each of them sees."""

    samples: int
    keys: int


class Layout:
    """Where tokens lie in the tiles of a stream of samples, as rows of ``(tokens · kv_heads, …)``.

    In order of tile, sample, key head, token. What is behind a sample's end is filled up with its last token.

    Attributes:
        tiles: Of the stream, in order.
        kv_heads: Heads of keys and values.
        rows: The row of each place of a query.
        filled: The places of queries that are behind their sample's end, or another sample's.
        places: The place of each row among the queries.
        keys: The row of each place of a key: a key has one in each tile that sees it.
    """

    def __init__(self, bounds: Sequence[int], kv_heads: int, stream_places: Tensor | None = None) -> None:
        """Lay out samples.

        Args:
            bounds: Where samples begin, and the end of the last.
            kv_heads: Heads of keys and values.
            stream_places: Where in the stream each token of the samples is, ``(bounds[-1],)``; ``None``: in order.
        """
        lengths = torch.tensor(bounds).diff()
        shared = torch.zeros_like(lengths) if stream_places is None else shared_tokens(bounds, stream_places)
        self.tiles = tuple(tiles_of(lengths.tolist(), shared.tolist()))
        self.kv_heads, self._count = kv_heads, (bounds[-1] - int(shared.sum())) * kv_heads
        rows, keys, row_is_there, key_is_there = [], [], [], []
        for samples, seen in self.tiles:
            chosen = (lengths > seen - TILE) & (shared < seen)
            first, last = shared[chosen, None], lengths[chosen, None] - 1
            tokens = torch.arange(seen).expand(samples, kv_heads, seen)
            token = torch.tensor(bounds[:-1])[chosen, None] + torch.minimum(torch.arange(seen), last)  # (samples, seen)
            token = token if stream_places is None else stream_places[token]
            row = token[:, None] * kv_heads + torch.arange(kv_heads)[:, None]  # (samples, kv_heads, seen)
            is_there = tokens <= last[:, None]
            keys.append(row.flatten())
            key_is_there.append(is_there.flatten())
            rows.append(row[..., -TILE:].flatten())
            row_is_there.append((is_there & (tokens >= first[:, None]))[..., -TILE:].flatten())
        self.rows, self.keys, self._key_is_there = torch.cat(rows), torch.cat(keys), torch.cat(key_is_there)
        there = torch.cat(row_is_there)
        self.filled = (~there).nonzero()[:, 0]
        self.places = torch.empty(self._count, dtype=torch.int64)
        self.places[self.rows[there]] = there.nonzero()[:, 0]

    @functools.cached_property
    def places_of_keys(self) -> tuple[Tensor, Tensor]:
        """The places of each row among the keys, one row after the other, and where those of each row begin."""
        places = self._key_is_there.nonzero()[:, 0]
        order, begins = sort_by_place(self.keys[places], self._count)
        return places[order], begins

    def split_rows(self, queries: Tensor, head_dim: int) -> Iterator[Tensor]:
        """Give the part of each tile, ``(samples · kv_heads, TILE · heads of a key head, head_dim)``."""
        return self._split(queries, [TILE] * len(self.tiles), head_dim)

    def split_keys(self, keys: Tensor, head_dim: int) -> Iterator[Tensor]:
        """Give the part of each tile, ``(samples · kv_heads, keys, head_dim)``."""
        return self._split(keys, [tile.keys for tile in self.tiles], head_dim)

    def _split(self, states: Tensor, tokens: Sequence[int], head_dim: int) -> Iterator[Tensor]:
        matrices = [tile.samples * self.kv_heads for tile in self.tiles]
        parts = torch.split(states, [count * each for count, each in zip(matrices, tokens, strict=True)])
        for part, count in zip(parts, matrices, strict=True):
            yield part.view(count, -1, head_dim)


@functools.lru_cache(maxsize=16)  # several where long samples cut a stream
def lay_out(bounds: tuple[int, ...], kv_heads: int, stream_places: bytes | None = None) -> Layout:
    """Give the layout of a stream; all layers of a batch share it. Places are the bytes of int64 numbers."""
    places = None if stream_places is None else torch.frombuffer(bytearray(stream_places), dtype=torch.int64)
    return Layout(bounds, kv_heads, places)


def tiles_of(lengths: Sequence[int], shared: Sequence[int] = ()) -> Iterator[Tile]:
    """Give the tiles of samples.

    Args:
        lengths: Tokens of each.
        shared: How many of them, at its begin, are computed with another sample; empty: none of any.
    """
    spans = list(zip(shared or [0] * len(lengths), lengths, strict=True))
    for first in range(0, max(lengths, default=0), TILE):
        samples = sum(begin < first + TILE and end > first for begin, end in spans)
        yield Tile(samples, first + TILE)


def shared_tokens(bounds: Sequence[int], stream_places: Tensor) -> Tensor:
    """Give how many tokens at the begin of each sample are computed with another one, ``(samples,)``.

    A sample's own tokens are those behind them, and lie together, in the order of samples.
    """
    ends = stream_places[torch.tensor(bounds[1:]) - 1] + 1
    return torch.tensor(bounds).diff() - ends.diff(prepend=ends.new_zeros(1))
