"""A LightningModule that answers prompts, with the adapter that is switched to or with none."""

import contextlib
from pathlib import Path
from typing import Any

import peft
import torch

from qlora_lightning.model.adapter_state import AdapterStateModule
from qlora_lightning.model.adapters.named import add_named_adapter
from qlora_lightning.model.generate import generate_answers


class AnsweringModule(AdapterStateModule):
    """Answers by :meth:`answer`; ``self.model.disable_adapter()`` and ``set_adapter(name)`` choose whose answer it is.

    Attributes:
        fast: Whether layers may run fused.
        autocast_dtype: That of the products, where some of what trains takes PEFT's own layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fast = True
        self.autocast_dtype: torch.dtype | None = None

    @property
    def causal_lm(self) -> Any:
        """The model of transformers inside PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the compute dtype what PEFT's own layers would compute in float32."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Put the adapter of a folder beside the model's own, to judge and to answer with.

        Raises:
            UserError: It belongs to another base, or does not fit this one.
        """
        fused = add_named_adapter(self.model, name, folder, self.identity, self.fast)
        dtype: torch.dtype = getattr(torch, self.identity.get("compute_dtype", "float32"))
        if not fused and dtype != torch.float32:
            self.autocast_dtype = dtype

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[list[int]]:
        """Answer each prompt of a prediction batch greedily; gives token ids."""
        return self.answer(batch["prompt_ids"], batch["stop_ids"])

    def answer(
        self, prompts: list[list[int]], stop_ids: list[int], max_new_tokens: int = 128, **options: Any
    ) -> list[list[int]]:
        """Continue each prompt (token ids) greedily until a stop token; gives token ids without it.

        Options are more arguments of :func:`~qlora_lightning.model.generate.generate_answers`.
        """
        with self.autocast():
            return generate_answers(self.model, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, **options)
