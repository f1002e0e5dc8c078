"""Plan how many tokens go through the model at a time and with which checkpointing, and lower the number if needed."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer

from qlora_lightning.model.activation_checkpointing import Checkpointing, GradientCheckpointing
from qlora_lightning.model.memory.fit import TOKENS_OF_A_CPU, Fit, list_remedies, memory_for_step, plan_fits
from qlora_lightning.model.step.accumulate import OutOfMemory
from qlora_lightning.model.step.packed import Cutter, samples_per_row
from qlora_lightning.support.console import say
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.trainer import find_callback, say_once

MicroBatchTokens = int | Literal["auto"]


class RowDoesNotFit(UserError):
    """Memory ran out on a single row, and no other choice of checkpointing is left."""


class TokenBudget(Callback):
    """Set how many tokens go through the model at a time, in complete rows, from ``micro_batch_tokens``.

    The module adds this callback in ``configure_callbacks``, because a fit is planned before its base is loaded.
    Evaluations use the number from the preceding fit.

    Args:
        setting: A number, or ``auto`` to find one.

    Attributes:
        tokens: The current number.
        fits: The current choice of checkpointing, then the choices to try next, in order, if a single row does not fit.
            Each comes with its initial number of tokens.
    """

    def __init__(self, setting: MicroBatchTokens) -> None:
        self.setting, self.is_auto = setting, setting == "auto"
        self._unplanned: int = TOKENS_OF_A_CPU if setting == "auto" else setting
        self.tokens = self._unplanned
        self._fitted = 0  # the most tokens that any micro-batch of this fit had, since memory ran out
        self.fits = [Fit(self.tokens, Checkpointing())]
        self._checkpointing = GradientCheckpointing()
        self._memory = 0  # bytes for a step and its base, before the base is loaded
        self._restored: dict[str, Any] | None = None  # the state from a checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan a fit; ``auto`` chooses by the formula, before any weight is downloaded or loaded.

        See :func:`~qlora_lightning.model.memory.fit.plan_fits`.
        """
        if stage == "fit":
            self._memory, self._restored = memory_for_step(trainer.strategy.root_device), None
            self._checkpointing = find_callback(trainer, GradientCheckpointing) or GradientCheckpointing()
            self.plan(pl_module)

    def plan(self, module: Any) -> None:
        """Choose tokens and checkpointing for the memory that was free before the base was loaded.

        This runs again if layers will run in a different way.
        """
        choices = self._checkpointing.choices(on_cuda=module.trainer.strategy.root_device.type == "cuda")
        planned = plan_fits(module, choices, self._memory) if self.is_auto else None
        self.fits = planned or [Fit(self._unplanned, choice) for choice in choices]
        self.tokens, self._fitted = self.fits[0].tokens, 0
        if self._restored is not None:
            self.restore(self._restored)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the plan.

        Raises:
            UserError: If checkpointing is needed, but transformers has none for this type.
        """
        module: Any = pl_module
        causal_lm = module.causal_lm
        if not causal_lm.supports_gradient_checkpointing:
            self.fits = [fit for fit in self.fits if not fit.choice.checkpointed]
            if not self.fits:
                raise UserError(
                    f"A {causal_lm.config.model_type} of transformers has no gradient checkpointing, but it is turned "
                    "on, or a row does not fit without it: set gradient_checkpointing.enabled to false, or set a "
                    "smaller data.max_length.",
                    "gradient_checkpointing.enabled",
                )
        say_once(f"At most {self.tokens:,} tokens go through the model at a time, {self.fits[0].choice}.")

    def record(self, part: Mapping[str, Any]) -> None:
        """Record that a part of a batch fit into memory; evaluations need less memory than training."""
        if torch.is_grad_enabled():
            self._fitted = max(self._fitted, part["input_ids"].numel())

    def lower(self, shortage: OutOfMemory, cutter: Cutter) -> None:
        """Use less memory than a part needed: a fifth fewer tokens or, for a single row, the next checkpointing.

        Raises:
            RowDoesNotFit: If no choice is left.
            UserError: If the base is sharded.
        """
        device, part = cutter.device, shortage.part
        if torch.is_grad_enabled():
            # autograd's thread for a GPU may still hold tensors of the failed backward; it frees them before this one
            torch.autograd.backward(torch.zeros((), device=device, requires_grad=True))
        torch.cuda.empty_cache()  # does nothing without a GPU
        if cutter.sharded_base is not None:
            raise UserError(
                f"Out of memory on {device} under a sharded base, whose other processes wait in their passes: "
                "set model.micro_batch_tokens to a smaller number, or a smaller data.max_length.",
                "memory.sharded",
            )
        tokens, n_rows = part["input_ids"].numel(), (len(part["cu_seqlens"]) - 1) // samples_per_row(part)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        suffix = f" in process {rank}" if rank else ""
        if n_rows > 1:
            if tokens > self._fitted:
                self.tokens = max(tokens * 4 // 5, self._fitted)
            else:  # such as a short part after larger ones: less memory is free now
                self.tokens = min(self.tokens, self._fitted) * 4 // 5
            self._fitted = 0
            say(
                f"Memory ran out{suffix} in a micro-batch of {tokens:,} tokens: from now on at most {self.tokens:,} "
                "tokens go through the model at a time. Only rounding, and what dropout draws, change."
            )
        elif len(self.fits) > 1 and torch.is_grad_enabled():
            del self.fits[0]
            self.tokens = self.fits[0].tokens
            self._checkpointing.switch(cutter.causal_lm, self.fits[0].choice)
            say(
                f"Memory ran out{suffix} in a row of {tokens:,} tokens: training continues {self.fits[0].choice}, by "
                "about a third slower."
            )
        else:
            # checkpointing does not help in a pass without gradients
            checkpoints = self.fits[0].choice.checkpointed or not torch.is_grad_enabled()
            on_cuda = device.type == "cuda"
            in_4_bits = getattr(cutter.causal_lm, "is_loaded_in_4bit", False)
            remedies = list_remedies(in_4_bits=in_4_bits, checkpoints=checkpoints, on_cuda=on_cuda)
            row_ids = part["row_ids"].tolist() if part.get("row_ids") is not None else []
            raise RowDoesNotFit(
                f"Out of memory on {device} in one row of {tokens:,} tokens "
                f"({cutter.locate(row_ids)}): {shortage.reason}. What is left: {remedies}.",
                "memory.row",
            )

    def capture(self) -> dict[str, Any]:
        """Return the state that a resumed run restores in this process; Lightning would keep only one process's."""
        return {"setting": self.setting, "tokens": self.tokens, "checkpointing": list(self.fits[0].choice)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the choices that a run had found; restore its tokens only if the setting is the same."""
        self._restored = state
        choices = [fit.choice for fit in self.fits]
        choice = Checkpointing(*state["checkpointing"])
        if choice in choices:
            self.fits = self.fits[choices.index(choice) :]
            self.tokens = self.fits[0].tokens
        if state.get("setting", "auto") == self.setting:
            self.tokens = int(state["tokens"])
