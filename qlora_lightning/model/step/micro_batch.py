"""Micro-batches: the parts in which a flat batch goes through the model, and smaller ones whenever memory runs out.

Gradients are of sums, so that it does not matter how a batch is cut.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from qlora_lightning.base.tensors import format_gib
from qlora_lightning.model.guards.guard import check_token_ids
from qlora_lightning.model.load.machine import free_bytes, is_out_of_memory, trim_malloc
from qlora_lightning.model.memory.checkpointing import Checkpointing, checkpointing_choices, switch_checkpointing
from qlora_lightning.model.memory.fit import REMEDIES, TOKENS_OF_A_CPU, USABLE, corrected_tokens, plan_fit
from qlora_lightning.model.step.batch import (
    check_row_length,
    cut_batch,
    filler_of,
    format_locations,
    is_flat,
    row_locations,
    samples_per_row,
)
from qlora_lightning.model.step.forward import skips_unlabelled
from qlora_lightning.model.step.layout import Layout, lay_out
from qlora_lightning.model.step.window import Window
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import datamodule_of, say_once

MicroBatchTokens = int | Literal["auto"]
Result = TypeVar("Result")


def lay_out_part(module: Any, batch: Mapping[str, Any]) -> Layout:
    """Lay a flat batch out as a module computes it; see :meth:`QLoRAModule.layout_of`."""
    causal_lm = module.causal_lm
    check_token_ids(batch, len(causal_lm.get_input_embeddings().weight), _data_of_rows(module))
    layout = lay_out(batch, skips_unlabelled=skips_unlabelled(causal_lm, module.noise_alpha, fast=module.fast))
    check_row_length(causal_lm.config, layout.samples.longest)
    return layout


def _data_of_rows(module: Any) -> Any:
    """Return the data module while it trains: it knows where training rows are from."""
    trainer = module._trainer
    return datamodule_of(trainer) if trainer is not None and trainer.training else None


class MicroBatchSize:
    """How many tokens go through the model at a time, in whole rows.

    Args:
        setting: Their number; ``auto`` finds it.

    Attributes:
        tokens: Their number now.
        checkpointing: What :class:`~qlora_lightning.callbacks.GradientCheckpointing` sets, if a Trainer has it.
        choices: Of checkpointing: the one in use, and those that help when a row alone does not fit, in their order.
    """

    def __init__(self, setting: MicroBatchTokens) -> None:
        if setting != "auto" and setting < 1:
            raise UserError(f"model.micro_batch_tokens is {setting}: expected a positive number, or auto.")
        self.is_auto = setting == "auto"
        self.tokens: int = TOKENS_OF_A_CPU if setting == "auto" else setting
        self.checkpointing: dict[str, Any] = {}
        self.choices = [Checkpointing()]
        self._switched_to, self._is_measured = Checkpointing(), False
        self._largest = 0  # tokens of the micro-batches in the measured peak

    def plan(self, module: Any) -> None:
        """Begin a fit: choose by the formula, if it is left to us, before any weight is downloaded or loaded.

        See :func:`~qlora_lightning.model.memory.fit.plan_fit`.
        """
        device = module.trainer.strategy.root_device
        settings, self.checkpointing = self.checkpointing, {}  # a next fit may have no such callback
        self.choices = checkpointing_choices(**settings, on_cuda=device.type == "cuda")
        self._is_measured, self._largest = not self.is_auto or device.type != "cuda", 0
        fit = plan_fit(module, self.choices) if self.is_auto else None
        if fit is not None:
            self.tokens, self.choices = fit.tokens, self.choices[self.choices.index(fit.choice) :]

    def start(self, causal_lm: Any) -> None:
        """Switch checkpointing as it was chosen, and print that."""
        if not causal_lm.supports_gradient_checkpointing and len(self.choices) > 1:
            self.choices = [Checkpointing()]
        self._switch_to_choice(causal_lm)
        say_once(f"At most {self.tokens:,} tokens go through the model at a time, {self.choices[0]}.")

    def _switch_to_choice(self, causal_lm: Any) -> None:
        switch_checkpointing(causal_lm, self._switched_to, self.choices[0])
        self._switched_to = self.choices[0]

    def correct(self, module: Any, window: Window) -> None:
        """Correct the plan once, by the peak of the second step or a later one: then the optimizer's state is there.

        Args:
            module: Its gradients of a step are there.
            window: Of this step. One whose batches were not cut had fewer tokens than it might.
        """
        self._largest = max(self._largest, window.largest)
        if self._is_measured or not module.trainer.global_step or window.micro_batches == len(window.batches):
            return
        self._is_measured = True
        held, peak = torch.cuda.memory_allocated(module.device), torch.cuda.max_memory_allocated(module.device)
        self.tokens = corrected_tokens(self._largest, held, peak, USABLE * (free_bytes(module.device) + held))
        say_once(f"Measured: {format_gib(peak)} at the peak. From now on at most {self.tokens:,} tokens go through.")

    # ---- cutting -----------------------------------------------------------------------------------------------------

    def lay_out(self, module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Give a flat batch the layouts of its parts: before it moves to a GPU, whose numbers would be waited for."""
        parts = cut_batch(batch, batch["cu_seqlens"].tolist(), self.tokens)
        layouts = [lay_out_part(module, part) for part in parts]
        if module.device.type == "cuda":  # from pinned memory alone it is copied in the background
            batch = {name: each.pin_memory() if isinstance(each, Tensor) else each for name, each in batch.items()}
        return {**batch, "layouts": layouts}

    def parts(self, module: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Cut a flat batch; see :meth:`QLoRAModule.micro_batches`."""
        layouts: list[Layout] = batch.get("layouts", [])
        layouts = layouts if all(each.matches(batch) for each in layouts) else []
        lengths = itertools.chain.from_iterable(each.lengths for each in layouts)
        cu_seqlens = list(itertools.accumulate(lengths, initial=0)) if layouts else batch["cu_seqlens"].tolist()
        parts = cut_batch(batch, cu_seqlens, self.tokens)
        if [len(each.lengths) for each in layouts] != [len(part["cu_seqlens"]) - 1 for part in parts]:
            layouts = [lay_out_part(module, part).to(module.device) for part in parts]
        if module.sharded_base is not None and (missing := module.sharded_base.largest(len(parts)) - len(parts)):
            filler = filler_of(batch, cu_seqlens)
            parts += [filler] * missing
            layouts = [*layouts, *[lay_out_part(module, filler).to(module.device)] * missing]
        return [{**part, "layout": layout.bind(part)} for part, layout in zip(parts, layouts, strict=True)]

    # ---- when memory runs out ----------------------------------------------------------------------------------------

    def run(
        self, module: Any, batches: list[Any], compute: Callable[[], Result], replay: Callable[[], Result]
    ) -> Result:
        """Return what takes memory to compute: as often as memory runs out, with less in the model at a time.

        Args:
            module: The module whose pass this is.
            batches: What is computed, or again by ``replay``; a message names their rows.
            compute: Computes it.
            replay: Computes it again.

        Raises:
            UserError: Nothing is left that would help.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                # any other batch cannot be cut, and of a sharded base the other processes wait in their passes
                if not is_out_of_memory(error) or not is_flat(batches[-1]) or module.sharded_base is not None:
                    raise
                words = str(error).partition("\n")[0].rstrip(".")
            self._reduce(module, batches, words)  # not in the handler: the error's traceback holds the activations
            compute = replay

    def _reduce(self, module: Any, batches: list[Any], words: str) -> None:
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(module.device)  # of what did not fit: correct() shall not see it
            self._largest = 0
        trim_malloc()  # on a CPU oneDNN maps code beside a heap that has grown as far as it can
        parts = [part for batch in batches for part in self.parts(module, batch)]
        parts.sort(key=lambda part: part["input_ids"].numel())
        several = [part for part in parts if len(part["layout"].lengths) > samples_per_row(part)]
        largest = (several or parts)[-1]  # which need not be the one that ran out
        tokens, process = largest["input_ids"].numel(), getattr(module._trainer, "global_rank", 0)
        where = f" in process {process}" if process else ""
        if several:
            self.tokens = tokens // 2
            say(
                f"Memory ran out{where} in micro-batches of up to {tokens:,} tokens: from now on at most "
                f"{self.tokens:,} tokens go through the model at a time. Only rounding, and what dropout draws, change."
            )
        elif len(self.choices) > 1 and torch.is_grad_enabled():
            del self.choices[0]
            self._switch_to_choice(module.causal_lm)
            say(
                f"Memory ran out{where} in a row of {tokens:,} tokens: training continues {self.choices[0]}, by about "
                "a third slower."
            )
        else:
            place = format_locations(row_locations(_data_of_rows(module), largest["layout"].rows))
            raise UserError(
                f"Out of memory on {module.device} in one row of {tokens:,} tokens ({place}): {words}. What is left: "
                f"{REMEDIES}."
            )

    # ---- in checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run restores."""
        return {"tokens": self.tokens, "checkpointing": list(self.choices[0]), "is_measured": self._is_measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a run had found; a number that is set stays."""
        if self.is_auto:
            self.tokens, self._is_measured = state["tokens"], state.get("is_measured", True)
        saved = Checkpointing(*state["checkpointing"])
        if saved in self.choices:
            self.choices = self.choices[self.choices.index(saved) :]
