"""Lightning callbacks for what happens around the training loop; those with settings have a key in the YAML."""

from collections.abc import Sequence
from typing import Any

from lightning import Callback

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.callbacks.evaluation import Evaluation
from qlora_lightning.callbacks.monitors import GPUMemoryMonitor, ThroughputMonitor
from qlora_lightning.callbacks.run_folder import MetricsLogger, PredictionWriter, RunFolder
from qlora_lightning.callbacks.run_report import RunReport
from qlora_lightning.callbacks.stop_signals import StopSignals
from qlora_lightning.model.activation_checkpointing import GradientCheckpointing

__all__ = [
    "AdapterCheckpoint",
    "Evaluation",
    "GPUMemoryMonitor",
    "GradientCheckpointing",
    "MetricsLogger",
    "PredictionWriter",
    "RunFolder",
    "RunReport",
    "StopSignals",
    "ThroughputMonitor",
    "default_callbacks",
]


def default_callbacks(config: dict[str, Any] | None = None, command: Sequence[str] | None = None) -> list[Callback]:
    """Return the callbacks of ``qlora-lightning fit`` with their default settings, for a Trainer in a script.

    Put one with other settings in the place of ours. Give the Trainer ``logger=MetricsLogger(folder)`` too, for
    ``metrics.csv``, of which the report draws its charts.

    Args:
        config: The run's whole config, which is written to ``config.yaml``; ``None``: there is none.
        command: The command line that the report shows; ``None``: that of this process.
    """
    return [
        GradientCheckpointing(),
        AdapterCheckpoint(),
        GPUMemoryMonitor(),
        ThroughputMonitor(),
        Evaluation(),
        RunFolder(config),
        RunReport(config, command),
        StopSignals(),
        PredictionWriter(),
    ]
