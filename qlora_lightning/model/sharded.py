"""Spreads a frozen base over the processes of a run: torch's FSDP2 gathers each decoder layer where it is used.

A step goes so: the layer's packed weights come together before its forward, and again before its backward; afterwards
each process keeps its own shard. The adapters are whole on every process, and DDP's. So every pass is one of all
processes: see :func:`collective_passes`, which is all that others need to know.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qlora_lightning.model.anatomy import decoder_layers, runs_flat
from qlora_lightning.model.layers.attention import NO_MASK, FlatBatch, flat_batch
from qlora_lightning.model.step.layout import samples_of_lengths
from qlora_lightning.model.step.loss import is_frozen_linear, lm_head_of, token_losses
from qlora_lightning.support.errors import UserError

_BYTE = torch.float8_e4m3fn  # as which bytes travel: FSDP2 of torch 2.11 takes floating dtypes only
_BODY, _HEAD, _DONE = range(3)  # what a process runs next among collective passes, in the order in which they come


@contextlib.contextmanager
def collective_passes(module: Any) -> Iterator[None]:
    """Let each process run as many forward passes without gradients as it likes, even if the base is sharded.

    Such a pass gathers layers, which takes all processes. Inside this context a process announces each pass, and one
    that has none gathers along. All processes must enter; one that raises inside ends, and the others with it. It does
    nothing if the base of the module is not sharded.
    """
    base: ShardedBase | None = getattr(module, "sharded_base", None)
    if base is None or base.announces or base.group.size() == 1:
        yield
        return
    base.announces = True
    try:
        yield
        base.sync_pass(_DONE)
    finally:
        base.announces = False


class ShardedBase:
    """A base of which each process holds a shard.

    Embedding and head are sharded too unless they are one tensor, or single rows of them are trained.

    Args:
        causal_lm: On the CPU, where it may be mapped from a file: one layer after the other is read and sharded.
        group: Of all processes, and for this alone: what DDP exchanges comes in an order of its own.
        device: Of this process.
        offload: Keep the shards on the host, pinned.
    """

    def __init__(self, causal_lm: Any, group: dist.ProcessGroup, device: torch.device, offload: bool = False) -> None:
        if not runs_flat(causal_lm.config):
            raise UserError(
                f"trainer.strategy ddp_sharded takes types that run in flat batches, and {causal_lm.config.model_type} "
                "runs a row at a time: set trainer.strategy to ddp."
            )
        # FSDP2's warning of outputs that are views: nobody writes into a layer's output
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.group, self._device, self.announces = group, device, False
        mesh = DeviceMesh.from_group(group, device.type)
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
        trainable = {parameter for parameter in causal_lm.parameters() if parameter.requires_grad}

        def shard(module: nn.Module) -> Any:
            settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": trainable}
            return fully_shard(module, offload_policy=policy, **settings)

        self._body, embedding, head = causal_lm.base_model, causal_lm.get_input_embeddings(), lm_head_of(causal_lm)
        self._parts_of_body: list[FSDPModule] = []
        self._head: Any = None
        layers = decoder_layers(causal_lm)
        for layer in layers:
            for linear in _quantized_linears(layer):
                _hold_as_bytes(linear, device)
            self._parts_of_body.append(shard(layer))
            _restore_weights_when_gathered(layer)
        if shards_vocabulary(causal_lm):
            self._parts_of_body.insert(0, shard(embedding))
            self._parts_of_body[0].set_unshard_in_backward(False)
            self._head = shard(ShardedHead(head))
            self._head.register_forward_pre_hook(lambda *_: self.sync_pass(_HEAD), prepend=True)
            vars(causal_lm)["sharded_head"] = self._head  # no part of the model, which has the head already
        fully_shard(self._body, mesh=mesh, ignored_params=set(self._body.parameters()))  # the root: no own weights
        # FSDP2 would gather ahead in the order of the passes that a process has run, which may differ among them
        for before, layer in pairwise([layers[0], *layers]):
            layer.set_modules_to_backward_prefetch([before])
        self._body.register_forward_pre_hook(lambda *_: self.sync_pass(_BODY), prepend=True)
        for root in filter(None, (self._body, self._head)):
            root.register_forward_hook(_reset_pass_order)

    def start(self) -> None:
        """Run one token, so that the processes meet.

        FSDP2 takes the module that runs first for the root, and NEFTune calls the embedding before the body.
        """
        token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        samples = samples_of_lengths([1]).to(self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), flat_batch(FlatBatch(samples)):
            options = {"attention_mask": NO_MASK, "use_cache": False}
            hidden: Tensor = self._body(token, position_ids=token, **options).last_hidden_state[0]  # (1, width)
            if self._head is not None:
                self._head(hidden)

    @staticmethod
    def skipping_shards(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function that moves, say, a tensor, but leaves a sharded one where it is."""
        return lambda tensor: tensor if isinstance(tensor, DTensor) else fn(tensor)

    def sync_pass(self, wanted: int) -> None:
        """Wait until the smallest pass that a process asks for is this one's; meanwhile join the others' gathers.

        When all ask for ``_DONE``, all have run what they had to run.
        """
        if not self.announces:
            return
        now = self._all_reduce_min(wanted)
        while now != wanted:
            for module in self._parts_of_body if now == _BODY else [self._head]:
                module.unshard()
                module.reshard()
            now = self._all_reduce_min(wanted)

    def largest(self, number: int) -> int:
        """Return the largest number that a process has; inside :func:`collective_passes` its own."""
        return number if self.announces else -self._all_reduce_min(-number)

    def _all_reduce_min(self, number: int) -> int:
        smallest = torch.tensor(number, device=self._device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, self.group)
        return int(smallest)


def _reset_pass_order(root: Any, *_: Any) -> None:
    """Clear the order of a pass without backward, which FSDP2 would keep until the next one with it."""
    if not torch.is_grad_enabled() and hasattr(root, "reset_iter_state"):  # torch 2.11 and 2.12 have nothing public
        root.reset_iter_state()


# ---- embedding and head ----------------------------------------------------------------------------------------------


def shards_vocabulary(causal_lm: Any) -> bool:
    """Whether a sharded base shards embedding and head: not one tensor for both, nor where PEFT trains single rows."""
    ends = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    trains_rows = any(isinstance(part, TrainableTokensLayer) for end in ends for part in end.modules())
    return not trains_rows and ends[0].weight is not ends[1].weight


class ShardedHead(nn.Module):
    """A head of which each process holds a shard: FSDP2 makes it whole for this module's forward, and its backward."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, *loss_arguments: Any) -> Any:
        """Compute losses, or the linear's output: as the head of a model of transformers, which scales it itself."""
        if not loss_arguments:
            return getattr(self.head, "linear", self.head)(hidden)
        targets, fast = loss_arguments
        return token_losses(hidden, targets, self.head, fast=fast)

    def token_losses(self, hidden: Tensor, targets: Tensor, fast: bool) -> Any:
        """Compute the losses of tokens; backward reads the head only where autograd makes its gradient."""
        sharded: Any = self
        sharded.set_unshard_in_backward(not (fast and is_frozen_linear(self.head)))
        return self(hidden, targets, fast)


# ---- packed weights --------------------------------------------------------------------------------------------------


def _quantized_linears(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if isinstance(each, bnb.nn.Linear4bit)]


def _hold_as_bytes(linear: Any, device: torch.device) -> None:
    """Leave a linear its packed bytes as a plain tensor, which FSDP2 can shard, and beside it what else they need."""
    weight = linear.weight
    linear.quant_state = weight.quant_state
    linear.quant_state.to(device)
    linear.weight = nn.Parameter(weight.data.view(_BYTE), requires_grad=False)


def _restore_weights(linears: list[Any]) -> None:
    """Give gathered weights back what bitsandbytes knows of them."""
    for linear in linears:
        if not isinstance(linear.weight, bnb.nn.Params4bit):
            state = linear.quant_state
            settings = {"quant_state": state, "quant_type": state.quant_type, "blocksize": state.blocksize}
            packed = linear.weight.data.view(torch.uint8)
            linear.weight = bnb.nn.Params4bit(packed, requires_grad=False, bnb_quantized=True, **settings)


def _restore_weights_when_gathered(layer: nn.Module) -> None:
    """Restore a layer's weights by hooks that come after FSDP2's, which gather."""
    linears = _quantized_linears(layer)

    def restore_before_backward(_: Any, inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: _restore_weights(linears))  # behind FSDP2's own hook, which gathers

    layer.register_forward_pre_hook(lambda *_: _restore_weights(linears))
    layer.register_forward_hook(restore_before_backward)


# ---- the strategy ----------------------------------------------------------------------------------------------------

SHARDED_STRATEGIES = {"ddp_sharded": False, "ddp_sharded_offload": True}  # names, and whether shards are offloaded


class ShardedDDPStrategy(DDPStrategy):
    """DDP of the adapters over a base of which each process holds a shard: what one device cannot hold.

    Results, checkpoints and adapter folders are those of ``ddp``. The module's ``sharded_base`` is what the base has
    become: see :class:`ShardedBase`.

    Args:
        offload: Keep the shards in the machine's memory, and copy each layer to the device when it is used. One process
            alone may do so too.
        kwargs: More arguments of ``DDPStrategy``.
    """

    def __init__(self, *, offload: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offload = offload

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard the base as soon as ``configure_model``, which runs inside, has loaded it on the CPU."""
        yield
        module: Any = self.lightning_module
        if module.sharded_base is not None:
            return
        module.sharded_base = ShardedBase(module.causal_lm, dist.new_group(), self.root_device, self.offload)
        module.to(self.root_device)
        module.sharded_base.start()


def register_strategies() -> None:
    """Let Lightning's Trainer know the sharded strategies by their names; the command line does so."""
    # a silent process is given up after ten minutes; Lightning waits for thirty
    options: dict[str, Any] = {"override": True, "timeout": timedelta(minutes=10)}
    for name, offload in SHARDED_STRATEGIES.items():
        StrategyRegistry.register(name, ShardedDDPStrategy, "DDP, the base sharded", offload=offload, **options)
