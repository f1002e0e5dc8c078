"""How many tokens go through the model at a time, and with which checkpointing: plan, correct and lower them."""

from typing import Any, Literal

import torch

from qlora_lightning.base.tensors import format_gib
from qlora_lightning.model.load.machine import free_bytes, trim_malloc
from qlora_lightning.model.memory.checkpointing import Checkpointing, checkpointing_choices, switch_checkpointing
from qlora_lightning.model.memory.fit import TOKENS_OF_A_CPU, USABLE, corrected_tokens, list_remedies, plan_fit
from qlora_lightning.model.step.batch import format_locations, row_locations, samples_per_row
from qlora_lightning.model.step.window import Window
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import say_once, split_of_pass, trainer_of

MicroBatchTokens = int | Literal["auto"]


class RowDoesNotFit(UserError):
    """Memory ran out in a single row, and no other choice of checkpointing is left."""


class TokenBudget:
    """The number of tokens that go through the model at a time, in whole rows, by ``micro_batch_tokens``.

    Args:
        setting: A number, or ``auto`` to find one.

    Attributes:
        tokens: The current number.
        checkpointing: Settings of :class:`~qlora_lightning.callbacks.GradientCheckpointing`, if a Trainer has it.
        choices: Of checkpointing: the current one, then those to try in turn if a single row does not fit.
        running: The micro-batch that goes through the model now.
    """

    def __init__(self, setting: MicroBatchTokens) -> None:
        if setting != "auto" and setting < 1:
            raise UserError(f"model.micro_batch_tokens is {setting}: expected a positive number, or auto.")
        self.setting, self.is_auto = setting, setting == "auto"
        self.tokens: int = TOKENS_OF_A_CPU if setting == "auto" else setting
        self.running: dict[str, Any] | None = None
        self.checkpointing: dict[str, Any] = {}
        self.choices = [Checkpointing()]
        self._switched_to, self._is_measured = Checkpointing(), False
        self._largest = 0  # tokens of the micro-batches in the measured peak

    def plan(self, module: Any) -> None:
        """Begin a fit: under ``auto`` choose by the formula, before any weight is downloaded or loaded.

        See :func:`~qlora_lightning.model.memory.fit.plan_fit`.
        """
        device = module.trainer.strategy.root_device
        settings, self.checkpointing = self.checkpointing, {}  # the next fit may have no such callback
        self.choices = checkpointing_choices(**settings, on_cuda=device.type == "cuda")
        self._is_measured, self._largest = not self.is_auto or device.type != "cuda", 0
        fit = plan_fit(module, self.choices) if self.is_auto else None
        if fit is not None:
            self.tokens, self.choices = fit.tokens, self.choices[self.choices.index(fit.choice) :]

    def start(self, causal_lm: Any) -> None:
        """Switch to the chosen checkpointing, and print it.

        Raises:
            UserError: It is needed, and transformers has none for this type.
        """
        if not causal_lm.supports_gradient_checkpointing:
            self.choices = [choice for choice in self.choices if not choice.checkpointed]
            if not self.choices:
                raise UserError(
                    f"A {causal_lm.config.model_type} of transformers has no gradient checkpointing, and it is asked "
                    "for, or a row does not fit without: set gradient_checkpointing.enabled to false, or a smaller "
                    "data.max_length."
                )
        self._switch_to_choice(causal_lm)
        say_once(f"At most {self.tokens:,} tokens go through the model at a time, {self.choices[0]}.")

    def _switch_to_choice(self, causal_lm: Any) -> None:
        switch_checkpointing(causal_lm, self._switched_to, self.choices[0])
        self._switched_to = self.choices[0]

    def correct(self, module: Any, window: Window) -> None:
        """Correct the plan once, by the peak of the second step or a later one, when the optimizer has its state.

        Args:
            module: The module, with the gradients of a step.
            window: The step's window. If its batches were not cut, they had fewer tokens than allowed.
        """
        self._largest = max(self._largest, window.largest)
        if self._is_measured or not module.trainer.global_step or window.micro_batches == len(window.batches):
            return
        self._is_measured = True
        allocated, peak = torch.cuda.memory_allocated(module.device), torch.cuda.max_memory_allocated(module.device)
        self.tokens = corrected_tokens(self._largest, allocated, peak, USABLE * (free_bytes(module.device) + allocated))
        say_once(f"Measured: {format_gib(peak)} at the peak. From now on at most {self.tokens:,} tokens go through.")

    def lower(self, module: Any, words: str) -> None:
        """Take less memory than ``running`` took: half its tokens or, for a single row, the next checkpointing.

        Args:
            module: The module in whose pass memory ran out.
            words: The error's message.

        Raises:
            RowDoesNotFit: No choice is left.
        """
        assert self.running is not None, "memory ran out in a micro-batch"
        on_cuda = module.device.type == "cuda"
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(module.device)  # correct() must not see the peak of what did not fit
            self._largest = 0
        trim_malloc()  # on a CPU oneDNN maps its code outside the heap, which may have taken all memory
        layout, tokens = self.running["layout"], self.running["input_ids"].numel()
        rank = getattr(trainer_of(module), "global_rank", 0)
        suffix = f" in process {rank}" if rank else ""
        if len(layout.lengths) > samples_per_row(self.running):
            self.tokens = tokens // 2
            say(
                f"Memory ran out{suffix} in a micro-batch of {tokens:,} tokens: from now on at most {self.tokens:,} "
                "tokens go through the model at a time. Only rounding, and what dropout draws, change."
            )
        elif len(self.choices) > 1 and torch.is_grad_enabled():
            del self.choices[0]
            self._switch_to_choice(module.causal_lm)
            say(
                f"Memory ran out{suffix} in a row of {tokens:,} tokens: training continues {self.choices[0]}, by about "
                "a third slower."
            )
        else:
            data, split = split_of_pass(module)
            location = format_locations(row_locations(data, layout.rows, split))
            # checkpointing does not help a pass without gradients
            checkpoints = self.choices[0].checkpointed or not torch.is_grad_enabled()
            remedies = list_remedies(module.quantization, checkpoints=checkpoints, on_cuda=on_cuda)
            raise RowDoesNotFit(
                f"Out of memory on {module.device} in one row of {tokens:,} tokens ({location}): {words}. What is "
                f"left: {remedies}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run restores."""
        state = {"setting": self.setting, "tokens": self.tokens, "checkpointing": list(self.choices[0])}
        return {**state, "is_measured": self._is_measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a run had found, its tokens only if the setting is the same."""
        if state.get("setting", "auto") == self.setting:
            self.tokens, self._is_measured = state["tokens"], state.get("is_measured", True)
        choice = Checkpointing(*state["checkpointing"])
        if choice in self.choices:
            self.choices = self.choices[self.choices.index(choice) :]
