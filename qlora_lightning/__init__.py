"""QLoRA fine-tuning of LLaMA models and their relatives with PyTorch Lightning.

Importing this package loads nothing heavy: each public name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qlora_lightning.version import __version__ as __version__

if TYPE_CHECKING:
    from qlora_lightning.callbacks import (
        AdapterCheckpoint,
        Evaluation,
        GPUMemoryMonitor,
        GradientCheckpointing,
        MetricsLogger,
        PredictionWriter,
        RunReport,
        StopSignals,
        ThroughputMonitor,
        default_callbacks,
    )
    from qlora_lightning.data.datamodule import InstructionDataModule, PreferenceDataModule
    from qlora_lightning.model.load.base_model import load_base
    from qlora_lightning.model.module import QLoRAModule
    from qlora_lightning.model.preferences import KTOModule, PreferenceModule
    from qlora_lightning.model.sharded import ShardedDDPStrategy
    from qlora_lightning.model.step.loss import LossSums
    from qlora_lightning.support.errors import UserError

__all__ = [
    "AdapterCheckpoint",
    "Evaluation",
    "GPUMemoryMonitor",
    "GradientCheckpointing",
    "InstructionDataModule",
    "KTOModule",
    "LossSums",
    "MetricsLogger",
    "PredictionWriter",
    "PreferenceDataModule",
    "PreferenceModule",
    "QLoRAModule",
    "RunReport",
    "ShardedDDPStrategy",
    "StopSignals",
    "ThroughputMonitor",
    "UserError",
    "default_callbacks",
    "load_base",
]

_HOMES = {
    "InstructionDataModule": "qlora_lightning.data.datamodule",
    "KTOModule": "qlora_lightning.model.preferences",
    "LossSums": "qlora_lightning.model.step.loss",
    "PreferenceDataModule": "qlora_lightning.data.datamodule",
    "PreferenceModule": "qlora_lightning.model.preferences",
    "QLoRAModule": "qlora_lightning.model.module",
    "ShardedDDPStrategy": "qlora_lightning.model.sharded",
    "UserError": "qlora_lightning.support.errors",
    "load_base": "qlora_lightning.model.load.base_model",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES.get(name, "qlora_lightning.callbacks"))
    return getattr(home, name)
