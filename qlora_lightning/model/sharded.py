"""Spreads a frozen base over the processes of a run: torch's FSDP2 gathers each decoder layer where it is used.

So every pass takes all processes: see :func:`collective_passes`, which is all that callers need to know.
"""

import contextlib
import warnings
from collections.abc import Iterator
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

from qlora_lightning.model.layers.attention import NO_MASK, PackedPass, packed_pass
from qlora_lightning.model.model_types import decoder_layers, runs_packed
from qlora_lightning.model.protocol import Module
from qlora_lightning.model.step.layout import sequences_of_lengths
from qlora_lightning.model.step.loss import is_frozen_linear, lm_head_of, token_losses
from qlora_lightning.support.errors import UserError

_BYTE = torch.float8_e4m3fn  # dtype in which packed bytes are gathered: FSDP2 of torch 2.11 took floating dtypes only
_BODY, _HEAD, _DONE = range(3)  # a process's next collective pass: the smallest of all processes runs first


@contextlib.contextmanager
def collective_passes(module: Module) -> Iterator[None]:
    """Let each process run as many forward passes without gradients as it likes, even if the base is sharded.

    Such a pass gathers layers, which takes all processes: inside this context a process announces each pass, and those
    that have none join its gathers. All processes must enter; if one raises inside, all end. Nothing happens if the
    base of the module is not sharded.
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

    Embedding and head are sharded too unless they are one tensor, or single rows of them are trained. The model is on
    the CPU, where it may be mapped from a file: layers are read and sharded one by one. The group of all processes is
    for this alone: DDP's collectives have an order of their own. ``offload`` keeps the shards on the host, pinned.
    """

    def __init__(self, causal_lm: Any, group: dist.ProcessGroup, device: torch.device, offload: bool = False) -> None:
        if not runs_packed(causal_lm.config):
            raise UserError(
                "trainer.strategy ddp_sharded takes types that run in packed batches, and "
                f"{causal_lm.config.model_type} runs a row at a time: set trainer.strategy to ddp.",
                "trainer.strategy",
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
            for linear in _quantized_linears(layer):  # FSDP2 shards packed bytes as a plain tensor
                linear.quant_state = linear.weight.quant_state
                linear.quant_state.to(device)
                linear.weight = nn.Parameter(linear.weight.data.view(_BYTE), requires_grad=False)
            self._parts_of_body.append(shard(layer))
            _restore_weights_when_gathered(layer)
        if shards_vocabulary(causal_lm):
            self._parts_of_body.insert(0, shard(embedding))
            self._parts_of_body[0].set_unshard_in_backward(False)
            self._head = shard(ShardedHead(head))
            self._head.register_forward_pre_hook(lambda *_: self.sync_pass(_HEAD), prepend=True)
            vars(causal_lm)["sharded_head"] = self._head  # no submodule: the model has the head already
        fully_shard(self._body, mesh=mesh, ignored_params=set(self._body.parameters()))  # the root, without own weights
        # FSDP2 would prefetch in the order of a process's last pass, which may differ among processes
        for previous, layer in pairwise([layers[0], *layers]):
            layer.set_modules_to_backward_prefetch([previous])
        self._body.register_forward_pre_hook(lambda *_: self.sync_pass(_BODY), prepend=True)
        for root in filter(None, (self._body, self._head)):
            root.register_forward_hook(_reset_pass_order)

    def start(self) -> None:
        """Run one token on all processes.

        FSDP2 takes the module that runs first for the root, and NEFTune calls the embedding before the body.
        """
        token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        sequences = sequences_of_lengths([1]).to(self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), packed_pass(PackedPass(sequences)):
            options = {"attention_mask": NO_MASK, "use_cache": False}
            hidden: Tensor = self._body(token, position_ids=token, **options).last_hidden_state[0]  # (1, width)
            if self._head is not None:
                self._head(hidden)

    def sync_pass(self, wanted: int) -> None:
        """Wait until the smallest pass that any process asks for is this one's; meanwhile join the others' gathers.

        When all ask for ``_DONE``, all have run all of their passes.
        """
        if not self.announces:
            return
        next_pass = self._all_reduce_min(wanted)
        while next_pass != wanted:
            for module in self._parts_of_body if next_pass == _BODY else [self._head]:
                module.unshard()
                module.reshard()
            next_pass = self._all_reduce_min(wanted)

    def largest(self, number: int) -> int:
        """Return the largest ``number`` of all processes; inside :func:`collective_passes` that of this one."""
        return number if self.announces else -self._all_reduce_min(-number)

    def _all_reduce_min(self, number: int) -> int:
        minimum = torch.tensor(number, device=self._device)
        dist.all_reduce(minimum, dist.ReduceOp.MIN, self.group)
        return int(minimum)


def _reset_pass_order(root: Any, *_: Any) -> None:
    """Clear the order of a pass without backward, which FSDP2 would keep until the next backward."""
    if not torch.is_grad_enabled() and hasattr(root, "reset_iter_state"):  # torch 2.12 has nothing public
        root.reset_iter_state()


# ---- embedding and head ----------------------------------------------------------------------------------------------


def shards_vocabulary(causal_lm: Any) -> bool:
    """Whether a sharded base shards embedding and head: not if they are one tensor, or PEFT trains single rows."""
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    trains_rows = any(isinstance(part, TrainableTokensLayer) for layer in (embedding, head) for part in layer.modules())
    return not trains_rows and embedding.weight is not head.weight


class ShardedHead(nn.Module):
    """A head of which each process holds a shard: FSDP2 gathers it for this module's forward and backward."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, *loss_arguments: Any) -> Any:
        """Compute losses; or, called by a model of transformers, the linear's output, which the model scales itself."""
        if not loss_arguments:
            return getattr(self.head, "linear", self.head)(hidden)
        targets, fused = loss_arguments
        return token_losses(hidden, targets, self.head, fused=fused)

    def token_losses(self, hidden: Tensor, targets: Tensor, fused: bool) -> Any:
        """Compute the losses of tokens; backward gathers the head only if autograd computes the gradient."""
        sharded: Any = self
        sharded.set_unshard_in_backward(not (fused and is_frozen_linear(self.head)))
        return self(hidden, targets, fused)


# ---- packed weights --------------------------------------------------------------------------------------------------


def _quantized_linears(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, bnb.nn.Linear4bit)]


def _restore_weights(linears: list[Any]) -> None:
    """Turn gathered bytes into weights of bitsandbytes again."""
    for linear in linears:
        if not isinstance(linear.weight, bnb.nn.Params4bit):
            state = linear.quant_state
            options = {"quant_state": state, "quant_type": state.quant_type, "blocksize": state.blocksize}
            packed = linear.weight.data.view(torch.uint8)
            linear.weight = bnb.nn.Params4bit(packed, requires_grad=False, bnb_quantized=True, **options)


def _restore_weights_when_gathered(layer: nn.Module) -> None:
    """Restore a layer's weights in hooks that run after FSDP2's, which gather."""
    linears = _quantized_linears(layer)

    def restore_before_backward(_: Any, inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: _restore_weights(linears))  # after FSDP2's own hook, which gathers

    layer.register_forward_pre_hook(lambda *_: _restore_weights(linears))
    layer.register_forward_hook(restore_before_backward)


# ---- the strategy ----------------------------------------------------------------------------------------------------

SHARDED_STRATEGIES = {"ddp_sharded": False, "ddp_sharded_offload": True}  # names, and whether shards are offloaded


class ShardedDDPStrategy(DDPStrategy):
    """DDP of the adapters over a base of which each process holds a shard: for a base too large for one device.

    Results, checkpoints and adapter folders are those of ``ddp``. The module's ``sharded_base`` is the base.

    Args:
        offload: Keep the shards in the machine's memory, and copy each layer to the device when it is used. It works
            for a single process too.
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
        group: Any = dist.new_group()  # torch's type allows the number that a process outside of the group gets
        module.sharded_base = ShardedBase(module.causal_lm, group, self.root_device, self.offload)
        module.to(self.root_device)
        module.sharded_base.start()


def register_strategies() -> None:
    """Let Lightning's Trainer know the sharded strategies by their names; the command line does so."""
    # a silent process is given up after ten minutes; Lightning waits for thirty
    options: dict[str, Any] = {"override": True, "timeout": timedelta(minutes=10)}
    for name, offload in SHARDED_STRATEGIES.items():
        StrategyRegistry.register(name, ShardedDDPStrategy, "DDP, the base sharded", offload=offload, **options)
