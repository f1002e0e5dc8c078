"""Ranges of code that tell the profiler which part of a step it is in, where no operator's name does."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.profilers import Profiler
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.profiler import record_function
from transformers import AttentionInterface

from qlora_lightning.commands.profile.parts import (
    ACTIVATION,
    ADAPTERS,
    ATTENTION,
    BASE,
    DATA,
    HEAD,
    NORMS,
    OPTIMIZER,
    REST,
    ROTARY,
    name_scope,
)
from qlora_lightning.model.layers.lora import FusedLinear, FusedLinear4bit, runs_fused

# modules of a LLaMA, by the end of their names: part, and whether with all inside
_MODULES = (
    (r"model|layers\.\d+", REST, False),
    (r"\w*norm", NORMS, True),
    (r"rotary_emb", ROTARY, True),
    (r"self_attn", ROTARY, False),  # which calls the linears and attention, and turns queries and keys itself
    (r"mlp", ACTIVATION, False),
    (r"\w+_proj", ADAPTERS, False),  # PEFT's layer
    (r"\w+_proj\.base_layer", BASE, False),
)
# what Lightning profiles, by the end of its names
_ACTIONS = {
    "train_dataloader_next": DATA,
    "batch_to_device": DATA,
    "training_step": REST,
    "backward": REST,
    "optimizer_step": OPTIMIZER,  # which runs forward and backward inside
    "on_before_optimizer_step": OPTIMIZER,
    "configure_gradient_clipping": OPTIMIZER,
    "optimizer_zero_grad": OPTIMIZER,
}


class Scopes:
    """The ranges that are open, the innermost last."""

    def __init__(self) -> None:
        self._open: list[str] = []

    @property
    def part(self) -> str:
        """What runs now."""
        return self._open[-1] if self._open else REST

    @contextlib.contextmanager
    def enter(self, part: str, whole: bool = False) -> Iterator[None]:
        """Open the range of a part."""
        self._open.append(part)
        try:
            with record_function(name_scope(part, whole)):
                yield
        finally:
            self._open.pop()

    def wrap(self, function: Callable[..., Any], part: str, whole: bool = False) -> Callable[..., Any]:
        """Give the function with a range around each call."""

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.enter(part, whole):
                return function(*args, **kwargs)

        return inside


@contextlib.contextmanager
def marking_parts(pl_module: Any, scopes: Scopes, autocasts: bool = False) -> Iterator[None]:
    """Put ranges around the loss, the parts of the model and its attention, but for what runs fused.

    That would go the slow way if one of its parts were watched or replaced; the names of its autograd functions tell
    its parts.

    Args:
        pl_module: What trains.
        scopes: Where ranges open.
        autocasts: Whether it computes under autocast, where no layer runs fused.
    """
    skipped = set(_inside_fused(pl_module.causal_lm, autocasts))
    with contextlib.ExitStack() as undo:
        _replace(pl_module, "compute_loss", scopes.wrap(pl_module.compute_loss, HEAD), undo)
        for name, module in pl_module.causal_lm.named_modules():
            if module in skipped:
                continue
            for pattern, part, whole in _MODULES:
                if re.search(rf"(^|\.)({pattern})$", name):
                    bare = part == ADAPTERS and not isinstance(module, LoraLayer)
                    _replace(module, "forward", scopes.wrap(module.forward, BASE if bare else part, whole), undo)
                    break
        kind = pl_module.causal_lm.config._attn_implementation  # transformers has no public name for it
        attend = AttentionInterface().get(kind)
        if attend is not None:
            AttentionInterface.register(kind, scopes.wrap(attend, ATTENTION, whole=True))
            undo.callback(AttentionInterface.register, kind, attend)
        yield


def _inside_fused(model: nn.Module, autocasts: bool) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, FusedLinear | FusedLinear4bit):
            yield from module.modules()
        elif runs_fused(module) and not autocasts:
            yield from (part for part in module.modules() if part is not module)


def _replace(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an attribute of this one object until ``undo`` is closed."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


class ActionRanges(Profiler):
    """Lightning's own door: a range around what it does itself."""

    def __init__(self, scopes: Scopes) -> None:
        super().__init__()
        self._scopes = scopes
        self._open: list[contextlib.ExitStack] = []

    def start(self, action_name: str) -> None:
        part = _part_of_action(action_name)
        if part is not None:
            self._open.append(contextlib.ExitStack())
            self._open[-1].enter_context(self._scopes.enter(part, whole=part == DATA))

    def stop(self, action_name: str) -> None:
        if self._open and _part_of_action(action_name) is not None:
            self._open.pop().close()


def _part_of_action(name: str) -> str | None:
    return _ACTIONS.get(re.split(r"[.\]]", name)[-1])
