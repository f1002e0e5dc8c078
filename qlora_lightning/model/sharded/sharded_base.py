"""Spreads a frozen base over the processes of a run: torch's FSDP2 gathers each decoder layer where it is used.

A step goes so: the layer's packed weights come together before its forward, and again before its backward; afterwards
each process keeps its own shard. The adapters are whole on every process, and DDP's. So every pass is one of all
processes: see :meth:`ShardedBase.turns`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qlora_lightning.model.layers.attention import NO_MASK
from qlora_lightning.model.step.layout import whole_samples
from qlora_lightning.model.step.loss import ShardedHead, head_of, shards_vocabulary
from qlora_lightning.support.errors import NOT_GATHERED
from qlora_lightning.support.versions import reset_passes

_BYTE = torch.float8_e4m3fn  # as which bytes travel: FSDP2 of torch 2.11 takes floating dtypes only


class ShardedBase:
    """A base of which each process holds a shard.

    Embedding and head are sharded too unless they are one tensor, or single rows of them are trained.

    Args:
        causal_lm: On the CPU, where it may be mapped from a file: one layer after the other is read and sharded.
        group: Of all processes, and for this alone: what DDP exchanges comes in an order of its own.
        device: Of this process.
        offload: Keep the shards on the host, pinned: all of them, or those of the first layers.
    """

    PASS, HEAD, DONE = range(3)  # what a process runs next, in the order in which they come

    def __init__(
        self, causal_lm: Any, group: dist.ProcessGroup, device: torch.device, offload: bool | int = False
    ) -> None:
        # FSDP2's warning of outputs that are views: nobody writes into a layer's output
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.group, self.device = group, device
        mesh = DeviceMesh.from_group(group, device.type)
        on_host, on_device = CPUOffloadPolicy(pin_memory=device.type == "cuda"), OffloadPolicy()
        trainable = {parameter for parameter in causal_lm.parameters() if parameter.requires_grad}

        def shard(module: nn.Module, offloads: bool) -> Any:
            settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": trainable}
            return fully_shard(module, offload_policy=on_host if offloads else on_device, **settings)

        body, embedding, head = causal_lm.base_model, causal_lm.get_input_embeddings(), head_of(causal_lm)
        self._body, self._in_turns = body, False
        self._of_body: list[FSDPModule] = []
        self._head: Any = None
        for number, layer in enumerate(body.layers):
            for linear in _linears_of(layer):
                _unpack(linear, device)
            self._of_body.append(shard(layer, offload is True or number < offload))
            _pack_when_gathered(layer)
        if shards_vocabulary(causal_lm):
            self._of_body.insert(0, shard(embedding, offload is True))
            self._of_body[0].set_unshard_in_backward(False)
            self._head = shard(ShardedHead(head), offload is True)
            self._head.register_forward_pre_hook(lambda *_: self._wait_for_turn(self.HEAD), prepend=True)
            vars(causal_lm)["sharded_head"] = self._head  # no part of the model, which has the head already
        fully_shard(body, mesh=mesh, ignored_params=set(body.parameters()))  # the root, with no weights of its own
        # FSDP2 would gather ahead in the order of the passes that a process has run, which may differ among them
        for before, layer in pairwise([body.layers[0], *body.layers]):
            layer.set_modules_to_backward_prefetch([before])
        body.register_forward_pre_hook(lambda *_: self._wait_for_turn(self.PASS), prepend=True)
        for root in filter(None, (body, self._head)):
            root.register_forward_hook(_forget_pass)

    def start(self) -> None:
        """Run one token, so that the processes meet.

        FSDP2 takes the module that runs first for the root, and NEFTune calls the embedding before the body.
        """
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        samples = whole_samples([1]).to(self.device)
        with torch.no_grad(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            options = {"attention_mask": NO_MASK, "samples": samples, "use_cache": False}
            states: Tensor = self._body(token, position_ids=token, **options).last_hidden_state[0]
            if self._head is not None:
                self._head(states)

    @staticmethod
    def leaving_shards(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function that moves, say, a tensor, but leaves a sharded one where it is."""
        return lambda tensor: tensor if isinstance(tensor, DTensor) else fn(tensor)

    def whole_modules(self) -> Iterator[nn.Module]:
        """Yield each sharded module while it is whole. All processes must iterate to the end."""
        for module in [*self._of_body, self._head]:
            if module is not None:
                module.unshard()
                _pack(_linears_of(module))
                yield module
                module.reshard()

    # ---- passes that not every process runs --------------------------------------------------------------------------

    @contextlib.contextmanager
    def turns(self) -> Iterator[None]:
        """Let each process run as many passes without gradients as it likes: the others gather along.

        All processes must enter. One that raises inside ends, and the others with it.
        """
        if self._in_turns or self.group.size() == 1:
            yield
            return
        self._in_turns = True
        try:
            yield
            self.take_turn(self.DONE, self._gather_along)
        finally:
            self._in_turns = False

    def take_turn(self, wanted: int, help_others: Callable[[int], object]) -> None:
        """Return when it is this process's turn: others', of smaller numbers, come first; :attr:`DONE` is the last."""
        while (turn := self._least(wanted)) != wanted:
            help_others(turn)

    def _least(self, number: int) -> int:
        least = torch.tensor(number, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        return int(least)

    def _wait_for_turn(self, wanted: int) -> None:
        if self._in_turns:
            self.take_turn(wanted, self._gather_along)

    def _gather_along(self, turn: int) -> None:
        for module in self._of_body if turn == self.PASS else [self._head]:
            module.unshard()
            module.reshard()


class GatheredParams4bit(bnb.nn.Params4bit):  # type: ignore[misc]  # bitsandbytes ships no types
    """A gathered weight, read only while it is whole: C++ would read memory that is gone."""

    @property
    def quant_state(self) -> Any:
        """Of bitsandbytes; who reads the weight asks for it first."""
        if not self.untyped_storage().size():
            raise RuntimeError(NOT_GATHERED)
        return self._state

    @quant_state.setter
    def quant_state(self, state: Any) -> None:
        self._state = state


GatheredParams4bit.__name__ = "Params4bit"  # by which PEFT goes


def _forget_pass(root: Any, *_: Any) -> None:
    """Clear the order of a pass without backward, which FSDP2 would keep until the next one with it."""
    if not torch.is_grad_enabled():
        reset_passes(root)


def _unpack(linear: Any, device: torch.device) -> None:
    """Leave a linear its packed bytes as a plain tensor, which FSDP2 can shard, and beside it what else they need."""
    weight = linear.weight
    linear.quant_state = weight.quant_state
    linear.quant_state.to(device)
    linear.weight = nn.Parameter(weight.data.view(_BYTE), requires_grad=False)


def _linears_of(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if isinstance(each, bnb.nn.Linear4bit)]


def _pack(linears: list[Any]) -> None:
    """Give gathered weights back what bitsandbytes knows of them."""
    for linear in linears:
        if not isinstance(linear.weight, bnb.nn.Params4bit):
            state = linear.quant_state
            known = {"quant_state": state, "quant_type": state.quant_type, "blocksize": state.blocksize}
            linear.weight = GatheredParams4bit(linear.weight.data.view(torch.uint8), bnb_quantized=True, **known)


def _pack_when_gathered(layer: nn.Module) -> None:
    """Pack a layer's weights by hooks that come after FSDP2's, which gather."""
    linears = _linears_of(layer)

    def pack_before_backward(_: Any, inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: _pack(linears))  # behind FSDP2's own hook of this output, which gathers

    layer.register_forward_pre_hook(lambda *_: _pack(linears))
    layer.register_forward_hook(pack_before_backward)
