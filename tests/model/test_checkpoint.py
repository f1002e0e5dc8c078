"""A checkpoint makes its module again, with its own base, shape and no code; anything else is rejected.

That a run resumes from it: ``tests/distributed/test_resume.py``.
"""

import copy
import pathlib
import pickle
import shutil

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from qlora_lightning import InstructionDataModule, LossSums, PreferenceModule, QLoRAModule
from tests.equality import same
from tests.errors import MachineFailed, rejects
from tests.steps import fit, make_module, make_trainer


class Own(QLoRAModule):
    """Takes what a file of tensors, numbers and texts holds, and what it does not."""

    def __init__(self, base, place=None, odd=None, **settings):
        super().__init__(base, **settings)
        self.place, self.odd = place, odd


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A module whose B is not zero, and a checkpoint of it as a Trainer writes it."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"rank": 2, "target_modules": "attention", "learning_rate": 0.5}
    module = make_module(tiny_base, cls=Own, place=folder, odd=[object()], **settings)
    trainer = make_trainer(folder)
    trainer.strategy.connect(module)
    trainer.callbacks += module.configure_callbacks()
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
    return module, folder / "last.ckpt"


def have_same_adapter(module, other):
    return same(dict(module.state_dict()), dict(other.state_dict()))


def test_a_module_is_made_again_from_its_checkpoint_which_holds_the_adapter_alone(trained, capsys):
    module, file = trained
    state = torch.load(file, weights_only=True)["state_dict"]
    assert len(state) == 2 * 4 * 2  # layers × linears × (A, B)
    assert all("lora_" in name for name in state)
    again = Own.load_from_checkpoint(file)
    assert have_same_adapter(module, again)
    assert (again.learning_rate, again.adapter_options["rank"]) == (0.5, 2)
    assert (again.place, again.odd) == (str(file.parent), None)
    assert "not in the checkpoint keep their defaults: odd." in capsys.readouterr().out
    assert Own.load_from_checkpoint(file, learning_rate=0.25).learning_rate == 0.25


def test_a_checkpoint_decides_neither_that_code_may_run_nor_what_is_imported(trained, tmp_path, capsys):
    checkpoint, file = torch.load(trained[1], weights_only=True), tmp_path / "other.ckpt"
    settings = checkpoint["qlora_lightning"]["settings"]
    settings |= {"trust_remote_code": True, "optimizer": "no_such_module.Optimizer", "gone": 1}
    del settings["learning_rate"]
    torch.save(checkpoint, file)
    module = QLoRAModule.load_from_checkpoint(file)  # which has no argument of Own's
    assert have_same_adapter(trained[0], module)
    assert (module.trust_remote_code, module.optimizer_config) == (False, None)
    assert module.hparams["learning_rate"] == "auto"
    out = capsys.readouterr().out
    assert "optimizer no_such_module.Optimizer is not used" in out
    assert "does not know: gone, place." in out
    assert QLoRAModule.load_from_checkpoint(file, trust_remote_code=True).trust_remote_code is True


@pytest.mark.parametrize(
    ("argument", "value"), [("strict", False), ("weights_only", False), ("hparams_file", "hparams.yaml")]
)
def test_arguments_of_lightnings_loading_are_taken_as_they_always_are(trained, argument, value):
    with rejects(argument, repr(value), "None" if argument == "hparams_file" else "True"):
        Own.load_from_checkpoint(trained[1], **{argument: value})
    usual = {"hparams_file": None, "strict": True, "weights_only": True}
    assert have_same_adapter(trained[0], Own.load_from_checkpoint(trained[1], None, **usual))


def test_a_module_is_copied_but_not_pickled_with_its_base(trained, tiny_base, tmp_path):
    for module in (trained[0], PreferenceModule(str(tiny_base), "kto")):
        module.configure_model()
        with rejects("module.pickle", type(module).__name__, "save_adapter"):
            torch.save(module, tmp_path / "module.pt")
        copied = copy.deepcopy(module)
        assert type(copied) is type(module)
        assert have_same_adapter(module, copied)
        assert copied.model is not module.model
    fresh = pickle.loads(pickle.dumps(QLoRAModule(str(tiny_base), rank=3)))  # without a base, as processes get it
    assert fresh.adapter_options["rank"] == 3


@pytest.mark.parametrize("change", [dict.popitem, lambda values: values.update(more=torch.ones(1))])
def test_of_a_state_that_does_not_fit_nothing_is_loaded(trained, change):
    before = {name: tensor.clone() for name, tensor in trained[0].state_dict().items()}
    values = {name: tensor + 1 for name, tensor in before.items()}
    change(values)
    with rejects("adapter.shapes", "The checkpoint"):
        trained[0].load_state_dict(values)
    assert same(before, dict(trained[0].state_dict()))


class Code:
    def __reduce__(self):
        return (print, ("ran",))


def cut(file):
    file.write_bytes(file.read_bytes()[:-9999])


WRONG_FILES = [  # what is done to a good file, and the key of the error
    (lambda file: torch.save({"state_dict": Code()}, file), "checkpoint.damaged"),
    (pathlib.Path.unlink, "checkpoint.missing"),
]
MORE_WRONG_FILES = [
    (lambda file: file.write_bytes(pickle.dumps({"state_dict": {}})), "checkpoint.damaged"),
    (cut, "checkpoint.damaged"),
    (lambda file: torch.save({"weight": torch.ones(1)}, file), "checkpoint.foreign"),
    (lambda file: torch.save([1], file), "checkpoint.foreign"),
]
WRONG_FILES += [pytest.param(*each, marks=pytest.mark.slow) for each in MORE_WRONG_FILES]


@pytest.mark.parametrize(("change", "key"), WRONG_FILES)
def test_a_wrong_file_is_rejected_by_all_that_reads_checkpoints(
    trained, tiny_base, rows_file, tmp_path, capfd, change, key
):
    file = shutil.copy(trained[1], tmp_path / "wrong.ckpt")
    change(file)
    data = InstructionDataModule(**dict.fromkeys(("train", "val", "test"), str(rows_file)), tokenizer=str(tiny_base))
    for name in ("fit", "validate", "test"):
        run = getattr(make_trainer(tmp_path, max_steps=1), name)
        with rejects(key, str(file)):
            run(QLoRAModule(str(tiny_base), rank=2), datamodule=data, ckpt_path=file)
    with rejects(key, str(file)):
        QLoRAModule.load_from_checkpoint(file)
    assert "ran" not in capfd.readouterr().out.split()


class SaveAt(lightning.Callback):
    """Saves a checkpoint at a hook, the second time that it comes."""

    def __init__(self, hook, folder):
        self.times, self.file = 0, folder / f"{hook}.ckpt"
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        self.times += 1
        if self.times == 2:
            trainer.save_checkpoint(self.file)


HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


@pytest.mark.slow
def test_what_was_saved_inside_an_optimizer_step_is_rejected(tiny_base, rows_file, tmp_path):
    def train(max_steps, *callbacks, ckpt_path=None):
        options = {"max_steps": max_steps, "accumulate_grad_batches": 4, "callbacks": [*callbacks]}
        fit(QLoRAModule(str(tiny_base), rank=2), tmp_path, rows_file, ckpt_path=ckpt_path, **options)

    train(2, *(SaveAt(hook, tmp_path) for hook in HOOKS))
    for hook in HOOKS:
        with rejects("checkpoint.position"):
            train(6, ckpt_path=tmp_path / f"{hook}.ckpt")


class FailsOnce(lightning.Callback):
    """Ends a fit inside its second step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            raise MachineFailed


@pytest.mark.slow
def test_a_module_whose_fit_ended_inside_a_step_resumes_without_its_gradients(tiny_base, rows_file, tmp_path):
    def train(module, *callbacks, ckpt_path=None):
        options = {"max_epochs": 1, "accumulate_grad_batches": 2, "callbacks": [*callbacks]}
        fit(module, tmp_path, rows_file, ckpt_path=ckpt_path, **options)
        return dict(module.state_dict())

    whole, module = (QLoRAModule(str(tiny_base), rank=2, compute_dtype="fp32") for _ in range(2))
    save = SaveAt("on_train_batch_end", tmp_path)
    expected = train(whole, save)
    with pytest.raises(MachineFailed):
        train(module, FailsOnce())
    assert same(train(module, ckpt_path=save.file), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # a resume without the ModelCheckpoint
def test_what_was_saved_before_a_validation_that_was_due_is_rejected(tiny_base, rows_file, tmp_path):
    def train(**options):
        module = QLoRAModule(str(tiny_base), rank=2)
        return fit(module, tmp_path, rows_file, val=True, max_epochs=1, limit_train_batches=4, **options)

    folder = tmp_path / "saves"
    saves = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    train(callbacks=[saves], enable_checkpointing=True, val_check_interval=2)
    for step in (2, 4):
        with rejects("checkpoint.before_validation"):
            train(ckpt_path=folder / f"step={step}.ckpt", val_check_interval=2)
    assert train(ckpt_path=folder / "step=3.ckpt", val_check_interval=2).global_step == 4
    assert train(ckpt_path=folder / "step=2.ckpt", val_check_interval=4).global_step == 4


class HasStates(QLoRAModule):
    """A stays as it was drawn (LoRA-FA), a mean is kept beside the model, and the schedule changes betas too."""

    def __init__(self, base, **settings):
        super().__init__(base, **settings)
        self.register_buffer("mean", torch.zeros(()))

    def build_model(self):
        model = super().build_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_B." in name)
        return model

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        if self.training:
            self.mean.lerp_(sums.loss_sum.detach() / sums.count, 0.1)
        return LossSums((1 + self.mean) * sums.loss_sum, sums.count)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FollowsMetric(QLoRAModule):
    """Its schedule is a step late in each checkpoint: it follows what is logged behind the save."""

    def __init__(self, base, interval, monitor, frequency=1, **settings):
        super().__init__(base, **settings)
        self.options = {"interval": interval, "monitor": monitor, "frequency": frequency}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0, threshold=9.0)
        return [optimizer], [{"scheduler": schedule, **self.options}]


@pytest.mark.parametrize(
    ("cls", "settings", "saves", "batches"),
    [
        (HasStates, {}, "on_train_batch_end", 3),
        (FollowsMetric, {"interval": "epoch", "monitor": "val_loss"}, "on_validation_end", 2),
        *(
            pytest.param(
                FollowsMetric,
                {"monitor": "train_loss"} | settings,
                "on_train_batch_end",
                batches,
                marks=pytest.mark.slow,
            )
            for settings, batches in (
                ({"interval": "epoch"}, 2),
                ({"interval": "epoch", "frequency": 2}, 2),
                ({"interval": "step"}, 3),
            )
        ),
    ],
)
def test_a_subclass_resumes_with_all_that_it_has(tiny_base, rows_file, tmp_path, cls, settings, saves, batches):
    def train(seed, *callbacks, ckpt_path=None):
        torch.manual_seed(seed)
        module = cls(str(tiny_base), rank=2, compute_dtype="fp32", **settings)
        options = {"max_epochs": 3, "limit_train_batches": batches, "limit_val_batches": 1, "callbacks": [*callbacks]}
        val = saves == "on_validation_end"
        trainer = fit(module, tmp_path, rows_file, val=val, ckpt_path=ckpt_path, **options)
        return [dict(module.state_dict()), trainer.optimizers[0].state_dict()]

    whole = train(1, save := SaveAt(saves, tmp_path))
    assert same(train(2, ckpt_path=save.file), whole)
