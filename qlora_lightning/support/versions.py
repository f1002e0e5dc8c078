"""Differences between versions, of the libraries that this package uses and of the files that it writes."""

from collections.abc import Callable
from typing import Any

from qlora_lightning.support.errors import UserError

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
