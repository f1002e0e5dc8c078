"""The settings of gradient checkpointing, which ``model/activation_checkpointing.py`` implements."""

from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

from qlora_lightning.support.errors import check_setting


class GradientCheckpointing(Callback):
    """Choose when layers keep only their input, and recompute their other activations in backward.

    Without this callback it is ``auto``. It affects training only.

    Args:
        enabled: ``auto`` switches it on if a single row would not fit without it, or runs out of memory; then
            with ``offload`` on a GPU.
        offload: Keep the inputs of these layers in pinned host memory instead of on the GPU, for long rows. The result
            is the same to the last bit. On a CPU it changes nothing.
    """

    def __init__(self, enabled: bool | Literal["auto"] = "auto", offload: bool = False) -> None:
        check_setting(
            "gradient_checkpointing.enabled", enabled, enabled in (True, False, "auto"), "true, false or auto"
        )
        self.enabled, self.offload = enabled, offload

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        if stage == "fit":
            module.token_budget.checkpointing = {"enabled": self.enabled, "offload": self.offload}
