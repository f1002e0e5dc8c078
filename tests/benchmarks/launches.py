"""How many kernels a GPU is asked to launch for a decoder layer, without a GPU.

A FakeTensor has a device, a shape and a dtype, and no numbers. A layer's forward runs on fake CUDA tensors: one on the
wrong device raises an error, and so does a number that the host reads. Backward runs on fake CPU ones, since autograd
asks a driver for CUDA's streams. A compiled region counts as one launch.

``python -m tests.benchmarks.launches`` prints what there is, beside the layers of PEFT and transformers. It takes a
torch that was built for CUDA; no driver.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lightning import QLoRAModule
from qlora_lightning.callbacks import ThroughputMonitor
from qlora_lightning.model.adapters.inject import add_adapters
from qlora_lightning.model.layers import attention, elementwise, lora
from qlora_lightning.model.layers.attention import NO_MASK, FlatBatch, flat_batch, register_flat_attention
from qlora_lightning.model.layers.decoder_layer import cast_adapters
from qlora_lightning.model.layers.fuse import choose_layers, fuse_layers
from qlora_lightning.model.load.base_model import freeze
from qlora_lightning.model.step.layout import lay_out
from tests.steps import make_batch

LAYERS = 4
LENGTHS = (64, 64, 64)
# no kernel runs for them
_VIEWS = (
    *("view", "reshape", "transpose", "aten.t.default", "slice", "select", "expand", "unsqueeze", "squeeze", "detach"),
    *("alias", "permute", "empty", "as_strided", "split", "unbind", "_unsafe_view", "lift_fresh", "is_", "sym_"),
    *("prim.", "resize"),
)


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel; those inside a region once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self._inside = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if not self._inside and not any(view in name for view in _VIEWS):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def run_region(self, function: Any, *arguments: Any) -> Any:
        self.found[f"region {function.__name__}"] += 1
        self._inside += 1
        try:
            return function(*arguments)
        finally:
            self._inside -= 1

    def by_layer(self) -> float:
        return sum(self.found.values()) / LAYERS


def make_model(*, fast: bool) -> Any:
    """Make a LLaMA in NF4 with adapters on all linears, as the module does."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation=register_flat_attention() if fast else "sdpa",
    )
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name, linear in list(base.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in name:
            shape = linear.in_features, linear.out_features
            quantized = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            quantized.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            base.set_submodule(name, quantized.to("cpu"))
    freeze(base)
    for module in base.modules():
        if fast and isinstance(module, bnb.nn.Linear4bit):  # as unnest_scales does
            state = module.weight.quant_state
            state.absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.nested, state.state2, state.offset = False, None, None
    model = add_adapters(base)
    if fast:
        fuse_layers(model)
    model.train()
    choose_layers(model)
    return model


class _Quantized(type):
    """Of a class whose instances have the state of a Params4bit, which no fake tensor is."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return hasattr(instance, "quant_state")


def make_fake(model: nn.Module, device: str) -> None:
    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=device)

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            module._parameters[name] = nn.Parameter(fake(parameter.data), requires_grad=parameter.requires_grad)
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                for owner in (state, state.state2) if state.nested else (state,):
                    for attribute in ("absmax", "code", "offset"):
                        if torch.is_tensor(value := getattr(owner, attribute, None)):
                            setattr(owner, attribute, fake(value))
                module._parameters[name].quant_state = state  # type: ignore[union-attr]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)


@contextlib.contextmanager
def pretending(launches: Launches) -> Iterator[None]:
    """Let the package believe in a GPU of compute capability 9.0 whose regions are compiled."""

    def attend_at_once(query: Any, key: Any, value: Any, bounds: Any, longest: int, scale: Any, window: Any) -> Any:
        options = {"is_causal": True, "scale": scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    pretended: list[tuple[Any, str, Any]] = [
        (elementwise, "run_region", launches.run_region),
        (attention, "has_ragged_kernel", lambda query, value: True),
        (attention, "attend_ragged", functools.partial(launches.run_region, attend_at_once)),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (lora, "sums_in_float32", lambda tensor: True),
        (bnb.nn, "Params4bit", _Quantized("Params4bit", (), {})),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in pretended:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def count(*, fast: bool) -> tuple[Launches, Launches]:
    """Count the launches of all layers, forward on fake CUDA tensors and backward on fake CPU ones."""
    forward, backward = Launches(), Launches()
    layout = lay_out(make_batch(LENGTHS), skips_unlabelled=False)
    model = make_model(fast=fast)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        run_forward(model, move(layout, "cuda"), forward, fast=fast)
    model = make_model(fast=fast)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = run_forward(model, move(layout, "cpu"), Launches(), fast=fast)
        with pretending(backward), backward:
            hidden.float().sum().backward()
    return forward, backward


def run_forward(model: Any, layout: Any, launches: Launches, *, fast: bool) -> torch.Tensor:
    """Run a model on fake tensors of the layout's device; return its hidden states."""
    make_fake(model, str(layout.input_ids.device))
    tokens = {"input_ids": layout.input_ids, "position_ids": layout.position_ids}
    base, options = model.get_base_model().base_model, {"use_cache": False}
    with pretending(launches), launches:
        if not fast:
            return base(**tokens, **options).last_hidden_state
        with flat_batch(FlatBatch(layout.samples, cast_adapters(model))):
            return base(**tokens, **options, attention_mask=NO_MASK).last_hidden_state


def move(value: Any, device: str) -> Any:
    """Give fake tensors on a device for what of a batch, or of its layout, is a tensor."""
    if torch.is_tensor(value):
        return torch.empty(tuple(value.shape), dtype=value.dtype, device=device)
    if isinstance(value, tuple | list):
        return type(value)(move(each, device) for each in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: move(each, device) for name, each in fields.items()})


class HostReads(TorchDispatchMode):
    """Counts how often the host waits for numbers of the device; gives zeros in their place."""

    _READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if "_to_copy" in str(function) and str(options.get("device")) == "cpu" and args[0].is_cuda:
            self.count += 1
            return torch.zeros(tuple(args[0].shape), dtype=options.get("dtype") or args[0].dtype)
        if "_local_scalar_dense" in str(function) and not args[0].is_cuda:
            return 0.0  # it has come home
        if any(read in str(function) for read in self._READS):
            raise AssertionError(f"The host reads a number of the device in {function}.")
        return function(*args, **options)


def count_host_reads(module_class: type[QLoRAModule] = QLoRAModule) -> int:
    """Count the reads of a step but the optimizer's own, on fake CUDA tensors.

    With layout, loss, window, guards, log, and the callbacks that measure each step.
    """
    module, batch = module_class("a"), make_batch(LENGTHS) | {"row_ids": torch.arange(3), "source": torch.arange(3)}
    module.model, module._device = make_model(fast=True), torch.device("cuda", 0)
    trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, callbacks=[module.guard], precision_plugin=None)
    module.trainer = trainer  # type: ignore[assignment]
    trainer.state, trainer.global_step, trainer.lightning_module = SimpleNamespace(stage=None), 5, module
    module.guard.checks_due = False  # later steps, between validations
    monitor = ThroughputMonitor()
    trainer.callback_metrics = {}

    def log(name: str, value: Any, **_: Any) -> None:
        trainer.callback_metrics[name] = float(value)  # as loggers read it

    def log_dict(values: dict[str, Any]) -> None:
        for item in values.items():
            log(*item)

    logs = mock.patch.multiple(module, log=log, log_dict=log_dict)
    # no driver is here, and under no_grad there is no graph
    without = mock.patch.multiple(torch.Tensor, pin_memory=lambda tensor: tensor, backward=lambda tensor: None)
    launches = Launches()
    with without:
        batch = module.on_before_batch_transfer(batch, 0)
    with FakeTensorMode(allow_non_fake_inputs=True), pretending(launches):
        make_fake(module.model, "cuda:0")
        with HostReads() as reads, logs, without:
            moved = {name: move(each, "cuda:0") for name, each in batch.items()}
            moved = module.on_after_batch_transfer(moved, 0)
            monitor.on_train_batch_start(trainer, module, moved, 0)
            with torch.no_grad():  # autograd asks a driver for CUDA's streams
                module.training_step(moved, 0)
            trainable = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
            for parameter in trainable:
                parameter.grad = torch.empty_like(parameter)
            module.on_before_optimizer_step(torch.optim.SGD(trainable, lr=0.1))
            trainer.global_step += 1
            monitor.on_train_batch_end(trainer, module, None, moved, 0)
    return reads.count


def main() -> None:
    fused, plain = count(fast=True), count(fast=False)
    print(f"{'launches a layer':<40}{'fused':>10}{'plain':>10}")
    for name, ours, theirs in zip(("forward", "backward"), fused, plain, strict=True):
        print(f"{name:<40}{ours.by_layer():>10.1f}{theirs.by_layer():>10.1f}")
        for operation, times in ours.found.most_common():
            print(f"  {operation:<38}{times / LAYERS:>10.2f}")
    print(f"host reads a step: {count_host_reads()}")


if __name__ == "__main__":
    main()
