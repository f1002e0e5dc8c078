"""Keys and values of rows that are being answered, each row with a length of its own, nothing padded."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

_ROOM = 64  # tokens that the cache grows by; what is free is read too, so not many


class KeyValueCache:
    """What attention has seen of each row, layer by layer.

    transformers' caches hold rows of one length, padded; to these flat batches can be added (the prompts), then one
    token of each row at a time, and rows that are done can be let go.

    Args:
        bounds: Where the prompts begin in the flat batch, and the end of the last: ``rows + 1`` numbers.
        device: Where the model is.

    Attributes:
        lengths: Tokens of each row so far, ``(rows,)`` int64: also the position of its next one.
        decoding: Whether the prompts are in, and single tokens follow.
    """

    def __init__(self, bounds: list[int], device: torch.device) -> None:
        self._bounds = bounds
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
        self._longest = max(sizes)  # of the rows that are left; known without asking the device
        self._capacity = _with_room(self._longest)
        self.lengths = torch.tensor(sizes, device=device)
        self.decoding = False
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # (rows, kv_heads, capacity, head_dim) each
        self._rows = torch.arange(len(sizes), device=device)
        self._hidden: Tensor | None = None  # 0 where a row has a token, else minus infinity

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take in keys and values of the prompts, ``(1, kv_heads, tokens, head_dim)`` of the flat batch."""
        rows, (_, kv_heads, _, head_dim) = len(self._bounds) - 1, key.shape
        # zeros: what a row does not have yet is weighed by zero, and zero times NaN is NaN
        made = [each.new_zeros(rows, kv_heads, self._capacity, head_dim) for each in (key, value)]
        for row, (start, end) in enumerate(itertools.pairwise(self._bounds)):
            for target, states in zip(made, (key, value), strict=True):
                target[row, :, : end - start] = states[0, :, start:end]
        self._layers[layer] = (made[0], made[1])

    def begin_step(self) -> None:
        """Make room for one more token of each row."""
        self.decoding = True
        self._longest += 1
        if self._longest > self._capacity:
            more = _with_room(self._longest) - self._capacity
            self._capacity += more
            for layer, states in self._layers.items():
                keys, values = (F.pad(each, (0, 0, 0, more)) for each in states)
                self._layers[layer] = (keys, values)
        places = torch.arange(self._capacity, device=self.lengths.device)
        self._hidden = torch.where(places <= self.lengths[:, None], 0.0, -torch.inf)[:, None, None]

    def end_step(self) -> None:
        """Count the token that every layer has seen."""
        self.lengths = self.lengths + 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Add one token of each row, and let it attend to all of its row.

        Args:
            layer: Whose keys and values they are.
            query: ``(1, heads, rows, head_dim)``.
            key: ``(1, kv_heads, rows, head_dim)``.
            value: Likewise.
            scale: Factor on the scores; ``None`` means ``head_dim ** -0.5``.

        Returns:
            The mixed values, ``(1, rows, heads, head_dim)``.
        """
        keys, values = self._layers[layer]
        keys[self._rows, :, self.lengths] = key[0].transpose(0, 1).to(keys.dtype)
        values[self._rows, :, self.lengths] = value[0].transpose(0, 1).to(values.dtype)
        # the heads that share a key head are like queries of one position
        queries = query[0].transpose(0, 1).reshape(len(keys), keys.shape[1], -1, query.shape[-1]).to(keys.dtype)
        assert self._hidden is not None, "begin_step comes first"
        hidden = self._hidden.to(keys.dtype)
        attend = _attend_by_products if keys.device.type == "cpu" else F.scaled_dot_product_attention
        mixed: Tensor = attend(queries, keys, values, attn_mask=hidden, scale=scale)
        return mixed.reshape(1, len(keys), -1, query.shape[-1])

    def keep(self, rows: list[int]) -> None:
        """Let go of all rows but these."""
        chosen = torch.tensor(rows, device=self.lengths.device)
        self.lengths, self._rows = self.lengths[chosen], self._rows[: len(rows)]
        self._longest = int(self.lengths.max())
        self._layers = {layer: (keys[chosen], values[chosen]) for layer, (keys, values) in self._layers.items()}


def _with_room(tokens: int) -> int:
    return (tokens // _ROOM + 1) * _ROOM


def _attend_by_products(
    queries: Tensor, keys: Tensor, values: Tensor, *, attn_mask: Tensor, scale: float | None
) -> Tensor:
    """Attend as torch's SDPA; for single tokens of many rows its kernels for a CPU are slower than plain products.

    Args:
        queries: ``(rows, kv_heads, queries, head_dim)``.
        keys: ``(rows, kv_heads, capacity, head_dim)``.
        values: Likewise.
        attn_mask: ``(rows, 1, 1, capacity)``, added to the scores.
        scale: Factor on the scores before that.
    """
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(queries, keys.transpose(-2, -1)).mul_(factor).add_(attn_mask)
    return torch.matmul(torch.softmax(scores, -1), values)
