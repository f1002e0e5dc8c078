"""Lightning callbacks for what happens around the training loop; those with settings have a key in the YAML."""

from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from qlora_lightning.callbacks.evaluation import Evaluation
from qlora_lightning.callbacks.monitors import GPUMemoryMonitor, ThroughputMonitor
from qlora_lightning.callbacks.run_folder import PredictionWriter
from qlora_lightning.callbacks.run_report import RunReport
from qlora_lightning.callbacks.stop_signals import StopSignals
from qlora_lightning.model.activation_checkpointing import GradientCheckpointing

__all__ = [
    "AdapterCheckpoint",
    "Evaluation",
    "GPUMemoryMonitor",
    "GradientCheckpointing",
    "PredictionWriter",
    "RunReport",
    "StopSignals",
    "ThroughputMonitor",
]
