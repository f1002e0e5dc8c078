"""How many tokens go through the model at a time: as many as fit, found anew whenever memory runs out."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lightning.model.layers.lora import Fused
from qlora_lightning.model.memory.formula import build_step_memory, tokens_that_fit
from qlora_lightning.model.step.batch import format_locations, row_locations
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of

MicroBatchTokens = int | Literal["auto"]
_DEFAULT_TOKENS = 8192
_report = rank_zero_only(say)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a class for a GPU's, and for a CPU's only its allocator's words."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


class MicroBatchSize:
    """The tokens that go through the model at a time.

    Args:
        setting: Their number; ``auto`` begins with 8,192.

    Attributes:
        tokens: Their number now.
        reserves: What can be done when a row alone does not fit, in the order in which it is done: each does it, and
            returns a sentence about it. :class:`~qlora_lightning.callbacks.GradientCheckpointing` has some.
    """

    def __init__(self, setting: MicroBatchTokens) -> None:
        if setting != "auto" and setting < 1:
            raise UserError(f"model.micro_batch_tokens is {setting}: expected a positive number, or auto.")
        self.setting = setting
        self.tokens = _DEFAULT_TOKENS if setting == "auto" else setting
        self.reserves: list[Callable[[], str]] = []

    def plan(self, module: Any) -> None:
        """Begin with what the formula says for a GPU's free memory, a tenth kept back, if all layers run fused."""
        layers = [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]
        fused = all(isinstance(each, Fused) and each.plain_reason is None for each in layers)
        if self.setting != "auto" or module.device.type != "cuda" or not fused or module.sharded_base is not None:
            return
        step = build_step_memory(module.model, layers[0].compute_dtype, optimizer=module.optimizer_config)
        cached = torch.cuda.memory_reserved(module.device) - torch.cuda.memory_allocated(module.device)
        free = int(0.9 * (torch.cuda.mem_get_info(module.device)[0] + cached))
        longest = getattr(datamodule_of(module.trainer), "max_length", _DEFAULT_TOKENS)
        is_checkpointed = any(each.gradient_checkpointing for each in layers)
        if not is_checkpointed and self.reserves and tokens_that_fit(step, free, longest) < longest:
            _report(f"A row of {longest:,} tokens would not fit: {self.reserves.pop(0)()}")
            is_checkpointed = True
        step = dataclasses.replace(step, every_n_layers=int(is_checkpointed))
        self.tokens = max(1, tokens_that_fit(step, free, longest))

    def attempt(self, module: Any, batch: Any, run: Callable[[], None]) -> bool:
        """Run what takes memory; if that runs out, let less of it go through the model the next time.

        Args:
            module: The module whose pass this is.
            batch: The largest batch at work.
            run: Runs it; what it has made must not matter when it runs again.

        Returns:
            Whether memory sufficed.

        Raises:
            UserError: Nothing is left that would help.
        """
        try:
            run()
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            words = str(error).partition("\n")[0]
        if module.sharded_base is not None:  # the other processes wait in their passes
            raise UserError(
                f"Out of memory on {module.device} under a sharded base: {words} Set model.micro_batch_tokens "
                f"to less than {self.tokens:,}, or gradient_checkpointing.enabled to true."
            )
        self._reduce(module, batch, words)  # not in the handler: the error's traceback holds the activations
        return False

    def _reduce(self, module: Any, batch: Any, words: str) -> None:
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
        parts = module.micro_batches(batch)
        tokens, largest = max(((each["input_ids"].numel(), each) for each in parts), key=lambda item: item[0])
        rows = (len(largest["cu_seqlens"]) - 1) // (2 if largest.get("pairs") else 1)
        if rows > 1:
            self.tokens = tokens // 2
            _report(
                f"Memory ran out in a micro-batch of {rows:,} rows and {tokens:,} tokens: from now on at most "
                f"{self.tokens:,} tokens go through the model at a time, with the same result."
            )
        elif self.reserves:
            _report(f"Memory ran out in a row of {tokens:,} tokens: {self.reserves.pop(0)()}")
        else:
            place = format_locations(row_locations(datamodule_of(module.trainer), largest["row_ids"].tolist()))
            raise UserError(
                f"Out of memory on {module.device} in one row of {tokens:,} tokens ({place}): {words} What is left: a "
                "smaller data.max_length, model.rank or model.base, model.quantization: nf4, "
                "gradient_checkpointing.enabled: auto, or trainer.strategy: ddp_sharded_offload."
            )
