"""Keys and values of rows that are being answered, each row with a length of its own, nothing padded."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """What attention has seen of each row, layer by layer.

    transformers' caches hold rows of one length, padded; to these flat batches can be added (the prompts), then one
    token of each row at a time, and rows that are done can be let go.

    Args:
        prompts: Tokens of each prompt.
        room: Tokens of each row that may follow.
        device: Where the model is.

    Attributes:
        lengths: Tokens of each row so far, ``(rows,)`` int64: also the position of its next one.
        decoding: Whether the prompts are in, and single tokens follow.
    """

    def __init__(self, prompts: Sequence[int], room: int, device: torch.device) -> None:
        self._known = list(prompts)  # the lengths, so that the device need not be asked
        self._capacity = max(prompts) + room
        self.lengths = torch.tensor(self._known, device=device)
        self.decoding = False
        self._layers: dict[int, Tensor] = {}  # keys and values: (2, rows, kv_heads, capacity, head_dim)
        self._rows = torch.arange(len(self._known), device=device)
        self._hidden: dict[int | None, Tensor] = {}  # by window: 0 where a row sees a token, else minus infinity
        self._of_prompts = (
            torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(self._known)).to(device),
            torch.cat([torch.arange(tokens) for tokens in prompts]).to(device),
        )

    def fill(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take in keys and values of the prompts, ``(1, kv_heads, tokens, head_dim)`` of the flat batch."""
        _, kv_heads, _, head_dim = key.shape
        # zeros: what a row does not have yet is weighed by zero, and zero times NaN is NaN
        states = key.new_zeros(2, len(self._known), kv_heads, self._capacity, head_dim)
        self._layers[layer] = states
        self._write(states, *self._of_prompts, key, value)

    def begin_step(self) -> None:
        """Count one more token of each row, which attention is about to see."""
        self.decoding = True
        self._hidden = {}
        self._known = [tokens + 1 for tokens in self._known]

    def end_step(self) -> None:
        """Count the token that every layer has seen."""
        self.lengths = self.lengths + 1

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Add one token of each row, and let it attend to all of its row, or to the last ones that a window shows.

        Queries are ``(1, heads, rows, head_dim)``, keys and values ``(1, kv_heads, rows, head_dim)``; the result is
        ``(1, rows, heads, head_dim)``.
        """
        states, hidden = self._layers[layer], self._hide(window)
        self._write(states, self._rows, self.lengths, key, value)
        keys, values = states[:, :, :, : hidden.shape[-1]]
        # the heads that share a key head are like queries of one position
        queries = query[0].transpose(0, 1).reshape(len(keys), keys.shape[1], -1, query.shape[-1]).to(keys.dtype)
        if keys.device.type == "cpu" or softcap is not None:
            mixed = _attend_by_products(queries, keys, values, hidden.to(keys.dtype), scale, softcap)
        else:
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=hidden.to(keys.dtype), scale=scale)
        return mixed.reshape(1, len(keys), -1, query.shape[-1])

    def _hide(self, window: int | None) -> Tensor:
        """Return what is added to the scores of this step, ``(rows, 1, 1, tokens)``; the same for all layers."""
        if window not in self._hidden:
            places, lengths = torch.arange(max(self._known), device=self.lengths.device), self.lengths[:, None]
            seen = places <= lengths if window is None else (places <= lengths) & (places > lengths - window)
            self._hidden[window] = torch.where(seen, 0.0, -torch.inf)[:, None, None]
        return self._hidden[window]

    def keep(self, rows: list[int]) -> None:
        """Let go of all rows but these."""
        chosen = torch.tensor(rows, device=self.lengths.device)
        self.lengths, self._rows = self.lengths[chosen], self._rows[: len(rows)]
        self._known = [self._known[row] for row in rows]
        self._layers = {layer: states[:, chosen] for layer, states in self._layers.items()}

    @staticmethod
    def _write(states: Tensor, rows: Tensor, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Write keys and values, a token each, in one operation."""
        by_token = torch.stack([key[0], value[0]]).permute(2, 0, 1, 3)  # (tokens, 2, kv_heads, head_dim)
        states[:, rows, :, places] = by_token.to(states.dtype)


def _attend_by_products(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Attend as torch's SDPA, whose bfloat16 kernels for a CPU round otherwise beside rows of other lengths."""
    scores = torch.matmul(queries, keys.transpose(-2, -1)).mul_(queries.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return torch.matmul(torch.softmax(scores.add_(hidden), -1), values)
