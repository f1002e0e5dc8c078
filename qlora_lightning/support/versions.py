"""What differs between versions: of the libraries that this package works with, and of the files that it writes."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
PEAK_NAMES = {"cuda": "memory_peak_gib", "cpu": "peak_rss_gib"}  # of the memory in metrics.csv and manifest.json


def check_version(version: int, source: str) -> None:
    """Refuse a format that a newer version of this package wrote, by a ``UserError``."""
    if version > FORMAT_VERSION:
        raise UserError(
            f"{source} has format version {version}, and this version of qlora_lightning reads up to {FORMAT_VERSION}: "
            "update qlora_lightning."
        )


def enable_activation_checkpointing(
    model: Any, context_fn: Callable[[], Any], *, draws: bool = True, offload: bool = False
) -> None:
    """Checkpoint the decoder layers of a model of transformers, non-reentrant; ``offload``: their inputs on the host.

    ``context_fn`` is that of torch's checkpoint. If layers draw no numbers, the generators' states need not be saved: a
    GPU's would be waited for. transformers 5.17 has this as ``gradient_checkpointing_enable``, of which 5.24 warns.
    """
    newer = "activation_checkpointing_enable"
    enable = getattr(model, newer if hasattr(model, newer) else "gradient_checkpointing_enable")
    options = {"use_reentrant": False, "preserve_rng_state": draws, "context_fn": context_fn}
    enable(options, offload=offload)
    # which only reentrant checkpointing would need, and which lets gradients run on below the adapters
    model.disable_input_require_grads()


def attend_ragged(
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    cu_seqlens: "Tensor",
    longest: int,
    scale: float | None,
    sliding_window: int | None = None,
) -> "Tensor":
    """Return causal attention within each sample, by torch's kernel for ragged samples.

    torch 2.11 wants as many heads of keys and values as of queries; later ones take fewer, by ``enable_gqa``.

    ``query`` is ``(1, heads, tokens, head_dim)``, ``key`` and ``value`` are ``(1, kv_heads, tokens, head_dim)``, the
    result is ``(1, tokens, heads, head_dim)``; ``longest`` is the longest sample's length, ``scale`` by default
    ``head_dim ** -0.5``. A token sees ``sliding_window`` tokens, itself included, or all before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (tokens, heads, head_dim)
    earlier = -1 if sliding_window is None else sliding_window - 1  # -1: every one
    options: dict[str, Any] = {"scale": scale, "window_size": (earlier, 0)}
    if _takes_grouped_heads(varlen_attn):
        options["enable_gqa"] = True
    else:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    return cast("Tensor", varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options))[None]


@functools.cache  # every layer of every step asks
def _takes_grouped_heads(kernel: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(kernel).parameters
