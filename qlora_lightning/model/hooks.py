"""Whether somebody watches a module: hooks on parts that a fused forward skips would go uncalled."""

from torch import nn
from torch.nn.modules import module as global_hooks

# torch has no public way to ask
_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def is_watched(module: nn.Module) -> bool:
    """Whether the module, or one inside it, has hooks, or all modules have."""
    return any(getattr(each, kind) for each in module.modules() for kind in _KINDS) or any(
        getattr(global_hooks, kind) for kind in _GLOBAL
    )
