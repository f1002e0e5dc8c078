"""Whether somebody watches or replaces a module: what hangs on parts that a fused forward skips would go uncalled."""

from torch import nn
from torch.nn.modules import module as global_hooks

# torch has no public way to ask
_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def is_watched(module: nn.Module) -> bool:
    """Whether the module, or one inside it, has hooks or a forward of its own, or all modules have hooks."""
    inside: list[nn.Module | None] = [module]
    for each in inside:  # grows on the way: every layer asks in every pass, and modules() takes four times as long
        if each is not None:
            own = each.__dict__  # quicker than to ask the module
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return True
            inside += own["_modules"].values()
    return any(getattr(global_hooks, kind) for kind in _GLOBAL)
