import lightning
import pytest

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.sources.folders import load_tokenizer
from tests import steps


@pytest.fixture
def make_module(tiny_base):
    """A module on the tiny base with a constant, large learning rate: its adapter moves visibly in one step."""
    defaults = {"base": str(tiny_base), "rank": 2, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0}
    return lambda cls=QLoRAModule, **options: cls(**(defaults | options))


@pytest.fixture(scope="session")
def tokenizer(tiny_base):
    return load_tokenizer(str(tiny_base))


@pytest.fixture
def make_data(tokenizer, rows_file):
    """Sixteen rows to train on and to validate on, two a batch: eight batches an epoch."""
    defaults = {"train": str(rows_file), "val": str(rows_file), "batch_size": 2, "tokenizer": tokenizer}
    return lambda **options: InstructionDataModule(**(defaults | options))


@pytest.fixture
def make_trainer(tmp_path):
    """A Trainer as Python users make it, with a run folder in the test's own folder."""

    def make(*callbacks, folder="run", **options):
        saves = any(isinstance(callback, lightning.pytorch.callbacks.Checkpoint) for callback in callbacks)
        usual = {"max_epochs": 1, "log_every_n_steps": 1, "enable_checkpointing": saves}
        return steps.make_trainer(tmp_path / folder, **(usual | options), callbacks=list(callbacks))

    return make


@pytest.fixture
def last(tmp_path):
    """The checkpoint that a run in the usual folder leaves."""
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def fit(make_module, make_data, make_trainer):
    """Train with some callbacks; gives trainer and module."""

    def run(*callbacks, module=None, data=None, ckpt_path=None, seed=7, **options):
        lightning.seed_everything(seed, verbose=False)
        module, data = module or make_module(), data or make_data()
        trainer = make_trainer(*callbacks, **options)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer, module

    return run


def calls(**hooks):
    """A callback of functions, by the hooks that call them."""
    callback = lightning.Callback()
    vars(callback).update(hooks)
    return callback


def at_step(step, act):
    """Call a function when the batch of this step begins."""
    return calls(on_train_batch_start=lambda trainer, *_: act() if trainer.global_step == step else None)


class Scored(QLoRAModule):
    """Logs a given score at each validation instead of one that happens to come out."""

    scores = ()

    def on_validation_epoch_end(self):
        self.log("val_score", self.scores[0])
        self.scores = self.scores[1:]


@pytest.fixture
def scored(make_module):
    def make(*scores):
        module = make_module(Scored)
        module.scores = scores
        return module

    return make
