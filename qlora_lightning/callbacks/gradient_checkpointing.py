"""The setting of gradient checkpointing; what it does stands in ``model/memory/checkpointing.py``."""

from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.support.errors import UserError


class GradientCheckpointing(Callback):
    """Say when layers keep only their input, and compute the rest of their activations again in backward.

    Without this callback it is ``auto``. Only training is changed by it.

    Args:
        enabled: ``auto`` switches it on if a row alone would not fit without, or memory runs out in one; then
            ``offload`` on a GPU.
        offload: Keep the inputs of these layers in pinned host memory instead of on the GPU, for long rows. The result
            is the same to the last bit. A CPU has them there in any case.
    """

    def __init__(self, enabled: bool | Literal["auto"] = "auto", offload: bool = False) -> None:
        if enabled not in (True, False, "auto"):
            raise UserError(f"gradient_checkpointing.enabled is {enabled!r}: expected true, false or auto.")
        self.enabled, self.offload = enabled, offload

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        if stage == "fit":
            module.token_budget.checkpointing = {"enabled": self.enabled, "offload": self.offload}
