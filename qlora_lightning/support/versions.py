"""Differences between versions, of the libraries that this package uses and of the files that it writes."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from qlora_lightning.support.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1


def check_version(version: int, source: str) -> None:
    """Reject a format that a newer version of this package wrote."""
    if version > FORMAT_VERSION:
        raise UserError(
            f"{source} has format version {version}, and this version of qlora_lightning reads up to {FORMAT_VERSION}: "
            "update qlora_lightning."
        )


def enable_activation_checkpointing(
    model: Any, context_fn: Callable[[], Any], *, draws: bool = True, offload: bool = False
) -> None:
    """Checkpoint the decoder layers of a transformers model, non-reentrant; ``offload``: keep their inputs on the host.

    ``context_fn`` is that of torch's checkpoint. If layers draw no random numbers, the generators' states are not
    saved, which would wait for the GPU. transformers 5.17 calls this ``gradient_checkpointing_enable``; 5.24 warns.
    """
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    options = {"use_reentrant": False, "preserve_rng_state": draws, "context_fn": context_fn}
    enable(options, offload=offload)
    # only reentrant checkpointing needs it, and it would compute gradients below the first adapter too
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

    torch 2.11 needs as many heads of keys and values as of queries; later versions take fewer, with ``enable_gqa``.

    ``query`` is ``(1, heads, tokens, head_dim)``, ``key`` and ``value`` are ``(1, kv_heads, tokens, head_dim)``, the
    result is ``(1, tokens, heads, head_dim)``; ``longest`` is the longest sample's length, ``scale`` by default
    ``head_dim ** -0.5``. A token sees ``sliding_window`` tokens, itself included, or all before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, head_dim)
    window_left = -1 if sliding_window is None else sliding_window - 1  # -1: no limit
    options: dict[str, Any] = {"scale": scale, "window_size": (window_left, 0)}
    if _takes_grouped_heads(varlen_attn):
        options["enable_gqa"] = True
    else:
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    return cast("Tensor", varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options))[None]


@functools.cache  # called by every layer of every step
def _takes_grouped_heads(kernel: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(kernel).parameters
