"""The one door to autograd functions, which torch does not type."""

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run an autograd function."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]
