"""Train any config on a Ray cluster: `python ray_train.py --workers 2 --config configs/quickstart.yaml`.

Each worker is one process of DDP; the other options are those of `qlora-lightning fit`. A run resumes from the last
checkpoint in its folder. So when a worker dies, Ray starts all of them again from there, three times; after that, or
when the cluster itself went away, start the script again. Machines of a cluster must share the current folder.
"""

import argparse
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray starts; a cluster: `ray start --disable-usage-stats`

from lightning import Trainer
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchConfig, TorchTrainer

from qlora_lightning.commands.fit import QLoRACLI


class RayCLI(QLoRACLI):
    """Module, data module and callbacks of a config; the Trainer's processes are Ray's workers."""

    def instantiate_trainer(self) -> Trainer:
        """Make the Trainer, whatever strategy and devices the config names."""
        options = {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()]}
        return prepare_trainer(super().instantiate_trainer(**options, devices="auto", num_nodes=1))


def train(run: dict) -> None:
    """Fit, or resume, in each worker."""
    os.chdir(run["folder"])
    RayCLI(["--ckpt_path=last", *run["options"]], "fit").run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="a GPU for each worker; else a CPU core")
    own, options = parser.parse_known_args()
    QLoRACLI(options)  # a mistake in the options ends here, and not in each worker
    TorchTrainer(
        train,
        train_loop_config={"folder": os.getcwd(), "options": options},
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ScalingConfig(num_workers=own.workers, use_gpu=own.gpus),
        run_config=RunConfig(storage_path=os.path.abspath("runs/ray"), failure_config=FailureConfig(max_failures=3)),
    ).fit()
