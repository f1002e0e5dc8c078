import lightning
import pytest

from qlora_lightning import AdapterCheckpoint, AdapterEMA
from qlora_lightning.commands.training import QLoRACLI
from qlora_lightning.support.errors import UserError
from tests.equality import adapter_bytes, read_adapter, read_checkpoint, same


class Steps(lightning.Callback):
    """The adapter after each optimizer step, and the one that is validated."""

    def __init__(self):
        self.after, self.validated = [], []

    def on_train_start(self, trainer, pl_module):
        self.first = trainer.global_step
        self.after.append(copies(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.first + len(self.after):
            self.after.append(copies(pl_module))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validated.append(copies(pl_module))


def copies(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def average_of(after, decay):
    """By the formula in the docstring."""
    average = {name: tensor.clone() for name, tensor in after[0].items()}
    for n, adapter in enumerate(after[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        for name in average:
            average[name].lerp_(adapter[name], 1 - d)
    return average


def test_training_goes_as_without_and_what_is_validated_and_saved_is_the_average(
    fit, tmp_path, adapter_of, assert_same
):
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    _, plain = fit(AdapterCheckpoint(), folder="plain", **options)
    steps = Steps()
    _, module = fit(steps, AdapterEMA(0.2), AdapterCheckpoint(), **options)
    assert len(steps.after) == 1 + 4
    assert_same(steps.after[-1], adapter_of(plain))
    average = average_of(steps.after, 0.2)  # 2/11, then 0.2
    assert_same(adapter_of(module), average)
    assert_same(steps.validated[0], average_of(steps.after[:3], 0.2))
    assert_same(steps.validated[1], average)
    last = read_checkpoint(tmp_path / "run")
    assert_same(last["adapter_ema"]["trained"], adapter_of(plain))
    assert_same(last["state_dict"], average)
    best = min((tmp_path / "run" / "checkpoints").glob("step-*"))
    averages = {
        name.removeprefix("model.").replace(".default.", "."): tensor
        for name, tensor in read_checkpoint(tmp_path / "run", best.name)["state_dict"].items()
    }
    assert_same(read_adapter(tmp_path / "run"), averages)


@pytest.mark.parametrize(
    "after", [5, pytest.param(7, marks=pytest.mark.slow)]
)  # inside a window, behind a validation; and in the one before an epoch's end
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_never_was(after, fit, killed_fit, tmp_path):
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4, "max_epochs": 2}

    def callbacks():
        return AdapterEMA(0.9), AdapterCheckpoint(every_n_train_steps=1)

    fit(*callbacks(), folder="peace", **options)
    killed_fit(*callbacks(), after=after, **options)
    fit(*callbacks(), ckpt_path=str(tmp_path / "run" / "checkpoints" / "last.ckpt"), **options)
    ended, peace = read_checkpoint(tmp_path / "run"), read_checkpoint(tmp_path / "peace")
    for part in ("state_dict", "adapter_ema", "optimizer_states", "lr_schedulers"):
        assert same(ended[part], peace[part])
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "peace")


def test_a_resumed_run_may_switch_it_off_or_on(fit, tmp_path, capsys, assert_same):
    fit(AdapterEMA(0.9), AdapterCheckpoint(), max_steps=2)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trained = read_checkpoint(tmp_path / "run")["adapter_ema"]["trained"]
    fit(steps := Steps(), AdapterEMA(enabled=False), AdapterCheckpoint(), ckpt_path=last, max_steps=3)
    assert_same(steps.after[0], trained)
    assert "ema.decay: 0.9 → off" in capsys.readouterr().out
    assert "adapter_ema" not in read_checkpoint(tmp_path / "run")
    fit(steps := Steps(), AdapterEMA(0.5), AdapterCheckpoint(), ckpt_path=last, max_steps=4)
    assert "ema.decay: off → 0.5" in capsys.readouterr().out
    assert_same(read_checkpoint(tmp_path / "run")["state_dict"], average_of(steps.after, 0.5))


def test_decay_out_of_range_is_rejected():
    with pytest.raises(UserError, match=r"ema\.decay is 1: expected a number from 0 to below 1"):
        AdapterEMA(1.0)


@pytest.mark.parametrize(
    ("yaml", "arguments", "expected"),
    [
        ("", [], (False, 0.999)),
        ("ema: {decay: 0.9}", [], (True, 0.9)),
        ("ema: {decay: 0.9}", ["--ema", "null"], (False, 0.9)),
        ("", ["--ema.decay", "0.5"], (True, 0.5)),
        ("ema: true", [], (True, 0.999)),
    ],
)
def test_its_key_switches_it_on(yaml, arguments, expected, tiny_base, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{base: {tiny_base}}}\ntrainer: {{accelerator: cpu, default_root_dir: {tmp_path}}}\n{yaml}\n"
    )
    made = QLoRACLI(["--config", str(config), *arguments], "fit")
    (ema,) = (each for each in made.trainer.callbacks if isinstance(each, AdapterEMA))
    assert (ema.enabled, ema.decay) == expected


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")  # Lightning's, before ours
def test_an_average_of_the_whole_model_is_rejected(fit):
    with pytest.raises(UserError, match=r"ema: \{decay: 0\.999\}"):
        fit(lightning.pytorch.callbacks.EMAWeightAveraging())
