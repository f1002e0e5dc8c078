"""What forward keeps for backward: the tensors that autograd saves, each storage once, by part."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lightning.commands.profile.parts import ADAPTERS, RECOMPUTATION, Widths, find_rule
from qlora_lightning.commands.profile.scopes import Scopes


class _Kept:
    """A saved tensor in the graph's hands."""

    def __init__(self, tensor: Tensor, part: str) -> None:
        self.tensor = tensor.detach()  # an output that is kept as it is would keep its own graph alive
        self.part = part
        self.in_graph = False


class KeptTensors:
    """Collects what is saved between :meth:`start` and :meth:`stop`.

    Args:
        model: Whose parameters and buffers are not counted.
        scopes: Tell the part that saves.
        widths: Tell the adapters' narrow matrices.
    """

    def __init__(self, model: nn.Module, scopes: Scopes, widths: Widths) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._scopes, self._widths = scopes, widths
        self._saved: list[weakref.ref[_Kept]] = []  # what is not saved after all goes before backward begins
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def start(self) -> None:
        """Begin, before forward."""
        self._hooks.__enter__()

    def stop(self) -> None:
        """End."""
        self._hooks.__exit__()

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor, self._scopes.part)
        self._saved.append(weakref.ref(kept))
        return kept

    def bytes_by_part(self, loss: Tensor) -> dict[str, int]:
        """Sum the bytes of what is kept.

        A tensor belongs to the part of the graph's node that saves it. What is saved but hangs on no node of the loss
        are the inputs of checkpointed layers.
        """
        beside: list[tuple[Tensor, str]] = []  # kept by a function's own means
        for node in _nodes(loss.grad_fn):
            rule = find_rule(node.name().rstrip("0123456789").removesuffix("Backward"))
            for kept in _saved_by(node):
                kept.in_graph = True
                kept.part = kept.part if rule is None else rule.part
            beside += [(tensor, self._scopes.part if rule is None else rule.part) for tensor in _attributes(node)]
        saved = [kept for kept in (reference() for reference in self._saved) if kept is not None]
        found = [(kept.tensor, kept.part if kept.in_graph else RECOMPUTATION) for kept in saved]
        sizes: dict[str, int] = {}
        seen = set(self._owned)
        for tensor, part in [*found, *beside]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                narrow = tensor.dim() == 2 and bool(set(tensor.shape) & self._widths.narrow - {1})
                name = ADAPTERS if narrow else part
                sizes[name] = sizes.get(name, 0) + storage.nbytes()
        return sizes


def _nodes(root: Any) -> Iterator[Any]:
    waiting, seen = [root], {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _saved_by(node: Any) -> Iterator[_Kept]:
    """Give what a node saves, without unpacking: that would run a checkpointed layer again."""
    for name in dir(node):
        if name.startswith("_raw_saved"):
            saved = getattr(node, name)
            for each in saved if isinstance(saved, tuple) else (saved,):
                if isinstance(each.data, _Kept):
                    yield each.data


def _attributes(node: Any) -> Iterator[Tensor]:
    """Give the tensors that a function has put on itself, as bitsandbytes' do."""
    for value in getattr(node, "__dict__", {}).values():
        yield from (each for each in (value if isinstance(value, list | tuple) else [value]) if torch.is_tensor(each))
