"""How many tokens go through the model at a time: as many as fit by the formula, and fewer whenever memory runs out."""

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers import AutoConfig

from qlora_lightning.base.adapter_folder import find_adapter_folder
from qlora_lightning.base.folder import open_base, read_config
from qlora_lightning.base.tensors import format_gib
from qlora_lightning.model.load.build import check_quantization, meta_model
from qlora_lightning.model.load.machine import free_bytes
from qlora_lightning.model.memory.formula import CONTEXT_BYTES, StepMemory, build_step_memory
from qlora_lightning.model.sharded import ShardedDDPStrategy
from qlora_lightning.model.step.batch import format_locations, is_flat, row_locations, samples_of
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of

MicroBatchTokens = int | Literal["auto"]
_TOKENS_OF_A_CPU = 8192  # more make its products no quicker
_USABLE = 0.9  # of the memory; the rest is for fragments, and for what the formula forgets
_MOST_TOKENS = 1 << 20
REMEDIES = (
    "a smaller data.max_length, model.rank or model.base, model.quantization: nf4, gradient_checkpointing.enabled: "
    "auto, or trainer.strategy: ddp_sharded_offload"
)
Result = TypeVar("Result")
_report = rank_zero_only(say)


class Checkpointing(NamedTuple):
    """Every how many layers one is checkpointed, 0: none; and whether the inputs of these wait in host memory."""

    every_n_layers: int = 0
    offload: bool = False

    def __str__(self) -> str:
        if not self.every_n_layers:
            return "without gradient checkpointing"
        return "with gradient checkpointing" + (", its inputs in host memory" if self.offload else "")


class Fit(NamedTuple):
    """How a step fits: the most ``tokens`` of a micro-batch, 0 if the longest row does not fit; and the formula."""

    tokens: int
    choice: Checkpointing
    step: StepMemory


def find_fit(step: StepMemory, usable: float, longest: int, choices: Sequence[Checkpointing]) -> Fit:
    """Find the first of the choices of checkpointing with which the longest row fits alone.

    Args:
        step: The formula.
        usable: Bytes that a step may take in all.
        longest: Tokens of the longest row.
        choices: In the order in which they are tried; each takes less memory than the one before.
    """
    for choice in choices:
        step = dataclasses.replace(step, **choice._asdict())
        tokens = bisect_right(range(_MOST_TOKENS), usable, key=lambda tokens: sum(step.parts(tokens).values())) - 1
        if tokens >= longest:
            return Fit(tokens, choice, step)
    return Fit(0, choice, step)


def usable_bytes(memory: float) -> float:
    """Return how much of a device's memory a step is planned for."""
    return _USABLE * memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a class for a GPU's, and for a CPU's only its allocator's words."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


class MicroBatchSize:
    """The tokens that go through the model at a time.

    Args:
        setting: Their number; ``auto`` finds it.

    Attributes:
        tokens: Their number now.
        choices: Of checkpointing: the one in use, and those that help when a row alone does not fit, in their order.
        apply: Switches checkpointing as a choice has it; :class:`~qlora_lightning.callbacks.GradientCheckpointing`
            sets both.
    """

    def __init__(self, setting: MicroBatchTokens) -> None:
        if setting != "auto" and setting < 1:
            raise UserError(f"model.micro_batch_tokens is {setting}: expected a positive number, or auto.")
        self.is_auto = setting == "auto"
        self.tokens: int = _TOKENS_OF_A_CPU if setting == "auto" else setting
        self.choices = [Checkpointing()]
        self.apply: Callable[[Checkpointing], None] = lambda choice: None
        self._planned = ""

    # ---- before a base is loaded -------------------------------------------------------------------------------------

    def plan(self, module: Any, dtype: torch.dtype) -> None:
        """Plan a fit by the formula, whose products are in ``dtype``: before any weight is downloaded or loaded.

        Raises:
            UserError: The longest row does not fit on the GPU, whatever is done.
        """
        source = open_base(module.base, module.revision, weights=False)
        if module.trust_remote_code and "auto_map" in read_config(source.folder, source.name):
            return  # code of its own need not run without numbers
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        double_quant = check_quantization(config, module.quantization, module.double_quant, source.name)
        folder = None if module.adapter is None else find_adapter_folder(module.adapter)
        model = meta_model(config, dtype, module.quantization, folder, module.adapter_options, module.fast)
        strategy, device = module.trainer.strategy, module.trainer.strategy.root_device
        memory = free_bytes(device) + CONTEXT_BYTES  # which is there already, and in the formula too
        longest = _longest_row(module)
        step = build_step_memory(
            model,
            dtype,
            double_quant=double_quant,
            optimizer=module.optimizer_config,
            device_bytes=memory,
            processes=module.trainer.world_size,
            sharded_offload=strategy.offload if isinstance(strategy, ShardedDDPStrategy) else None,
        )
        fit = find_fit(step, usable_bytes(memory), longest, self.choices)
        self.choices = self.choices[self.choices.index(fit.choice) :]
        if device.type != "cuda":  # of which the formula tells only whether memory is short
            self.tokens = min(fit.tokens or longest, _TOKENS_OF_A_CPU)
            return
        if not fit.tokens:
            needed = sum(fit.step.parts(longest).values())
            fixed = sum(fit.step.fixed.values())
            raise UserError(
                f"{module.base} does not fit: {fit.choice} one row of {longest:,} tokens is planned to take "
                f"{format_gib(needed)} ({format_gib(fixed)} without its activations), and {device} has "
                f"{format_gib(usable_bytes(memory))} for it. What is left: {REMEDIES}. A number as "
                "model.micro_batch_tokens tries it without a plan."
            )
        self.tokens = fit.tokens
        self._planned = f", planned for {format_gib(usable_bytes(memory))}"

    def announce(self) -> None:
        """Print what was chosen."""
        _report(f"At most {self.tokens:,} tokens go through the model at a time{self._planned}, {self.choices[0]}.")

    # ---- while it runs -----------------------------------------------------------------------------------------------

    def run(
        self, module: Any, batch: Any, compute: Callable[[], Result], before_retry: Callable[[], None] = lambda: None
    ) -> Result:
        """Return what takes memory to compute: as often as memory runs out, with less in the model at a time.

        Args:
            module: The module whose pass this is.
            batch: The current batch, whose rows a message names.
            compute: Computes it.
            before_retry: Called before it is computed again.

        Raises:
            UserError: Nothing is left that would help.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error) or not is_flat(batch):  # any other batch cannot be cut
                    raise
                words = str(error).partition("\n")[0]
            if module.sharded_base is not None:  # the other processes wait in their passes
                raise UserError(
                    f"Out of memory on {module.device} under a sharded base: {words} Set model.micro_batch_tokens "
                    f"to less than {self.tokens:,}, or gradient_checkpointing.enabled to true."
                )
            self._reduce(module, batch, words)  # not in the handler: the error's traceback holds the activations
            before_retry()

    def _reduce(self, module: Any, batch: Any, words: str) -> None:
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
        parts = module.micro_batches(batch)
        tokens, largest = max(((each["input_ids"].numel(), each) for each in parts), key=lambda item: item[0])
        rows = (len(largest.get("cu_seqlens", (0, 1))) - 1) // (2 if largest.get("pairs") else 1)
        if rows > 1:
            self.tokens = tokens // 2
            _report(
                f"Memory ran out in a micro-batch of {rows:,} rows and {tokens:,} tokens: from now on at most "
                f"{self.tokens:,} tokens go through the model at a time, with the same result."
            )
        elif len(self.choices) > 1 and torch.is_grad_enabled() and module.causal_lm.supports_gradient_checkpointing:
            del self.choices[0]
            self.apply(self.choices[0])
            _report(
                f"Memory ran out in a row of {tokens:,} tokens: training continues {self.choices[0]}, with the same "
                "result, by about a third slower."
            )
        else:
            row_ids = largest["row_ids"].tolist() if "row_ids" in largest else []
            place = format_locations(row_locations(datamodule_of(module._trainer), row_ids))
            raise UserError(
                f"Out of memory on {module.device} in one row of {tokens:,} tokens ({place}): {words} What is left: "
                f"{REMEDIES}."
            )

    # ---- in checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run restores."""
        return {"tokens": self.tokens, "checkpointing": list(self.choices[0])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a run had found, unless a number is set."""
        if not self.is_auto:
            return
        self.tokens, self._planned = state["tokens"], ""
        saved = Checkpointing(*state["checkpointing"])
        if saved in self.choices:
            self.choices = self.choices[self.choices.index(saved) :]


def _longest_row(module: Any) -> int:
    """Return the tokens of the longest training row; of a pair both answers count."""
    data = datamodule_of(module.trainer)
    samples = samples_of(data, "train")
    longest = getattr(data, "max_length", _TOKENS_OF_A_CPU) if samples is None else int(samples.lengths.max())
    return min(longest, _MOST_TOKENS - 1)
