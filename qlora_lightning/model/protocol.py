"""What rooms below the LightningModule read of it: they import this, and it imports them."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from lightning import Trainer
from torch import Tensor


class Module(Protocol):
    """A :class:`~qlora_lightning.model.module.QLoRAModule`, which has what each attribute means."""

    base: str
    revision: str | None
    trust_remote_code: bool
    quantization: Any
    double_quant: bool
    compute_dtype: Any
    adapter: str | None
    adapter_options: dict[str, Any]
    optimizer_config: Any
    learning_rate: Any
    schedule: str | dict[str, Any]
    warmup: int | float
    fast: bool
    model: Any
    identity: dict[str, Any]
    own_names: frozenset[str]
    precision: Any
    sharded_base: Any
    token_budget: Any
    window: Any
    loss_scale: Any
    statistics: Any

    @property
    def pairs(self) -> bool: ...  # QLoRAModule has the docstrings
    @property
    def trainer(self) -> Trainer: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def causal_lm(self) -> Any: ...
    @property
    def automatic_optimization(self) -> bool: ...
    def compute_loss(self, batch: Any) -> Any: ...
    def overrides(self, name: str) -> bool: ...
    def autocast(self, whole: bool = False) -> AbstractContextManager[Any]: ...
    def sum_loss(self, micro_batch: Any) -> Any: ...
    def prepare_batch(self, batch: Any) -> Any: ...
    def micro_batch_of(self, batch: Any) -> Any: ...
    def log_means(self, split: str, means: dict[str, Tensor], sync_dist: bool = False) -> None: ...
