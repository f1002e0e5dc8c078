"""A run that would train on for nothing is stopped: by losses, gradients, token ids."""

import contextlib
import itertools
import math

import lightning
import peft
import pytest
import torch
from lightning import Callback
from lightning.fabric import Fabric
from lightning.pytorch import callbacks
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import AutoModelForCausalLM

from qlora_lightning import AdapterCheckpoint, LossSums, MetricsLogger, QLoRAModule, load_base
from qlora_lightning.report import read_metrics
from tests.errors import MachineFailed, rejects
from tests.packed import collate
from tests.steps import fit, make_module, trainable_tensors


class Spoilt(QLoRAModule):
    """The loss or the gradient of some steps is not finite."""

    def __init__(self, base, steps=(), gradient_steps=(), **settings):
        super().__init__(base, **settings)
        self.steps, self.gradient_steps = steps, gradient_steps

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        nll = sums.loss_sum * math.inf if self.trainer.global_step in self.steps else sums.loss_sum
        if self.trainer.global_step in self.gradient_steps:
            nll.register_hook(lambda gradient: gradient * math.nan)
        return LossSums(nll, sums.count, sums.metrics)


@pytest.fixture
def train(tiny_base, rows_file, tmp_path):
    """Train on sixteen rows, two a micro-batch, two of these a step: four steps an epoch; give the Trainer."""

    def run(cls=QLoRAModule, *added, val=False, trainer_options=(), **settings):
        lightning.seed_everything(7, verbose=False)
        usual = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}
        run.module = cls(str(tiny_base), **usual | settings)
        options = {"max_epochs": 1, "accumulate_grad_batches": 2, "callbacks": list(added)} | dict(trainer_options)
        return fit(run.module, tmp_path / "run", rows_file, val=val, **options)

    return run


class Diary(Callback):
    """Notes the rows of each step, and behind it the loss."""

    def __init__(self):
        self.rows, self.losses = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.global_step, []).extend(batch["row_ids"].tolist())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses[trainer.global_step] = float(trainer.callback_metrics.get("train_loss", math.nan))


class OwnStep(QLoRAModule):
    def training_step(self, batch, batch_idx):
        return 0.0 * super().training_step(batch, batch_idx)


class OwnBackward(QLoRAModule):
    def backward(self, loss, *args):
        (0.5 * loss).backward()


class OwnZeroGrad(QLoRAModule):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=True)


class ForgetsToDivide(QLoRAModule):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)  # as Lightning's documentation has it, without super()


class LeavesEvaluationMode(QLoRAModule):
    def on_train_start(self):
        self.model.eval()


class StepsByHand(QLoRAModule):
    automatic_optimization = False


class TrainsNorms(QLoRAModule):
    """As LongLoRA does, whose norms no adapter folder holds."""

    def build_model(self):
        model = super().build_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
        return model


class BuildsNothing(QLoRAModule):
    def build_model(self):
        load_base(self.base)


class BuildsMore(QLoRAModule):
    def build_model(self):
        return load_base(self.base)


class LossOfTransformers(QLoRAModule):
    def compute_loss(self, model, inputs, return_outputs=False):
        return model(**inputs).loss


class DropsCallbacks(QLoRAModule):
    def configure_callbacks(self):
        return []


class Apple(CPUAccelerator):
    """A machine whose GPU is not there."""

    def setup_device(self, device):
        assert device.type == "mps"


def compiled(base):
    return torch.compile(QLoRAModule(base))


class TrainsInBFloat16(QLoRAModule):
    def build_model(self):
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16)
        config = peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def made(base, change):
    module = QLoRAModule(base)
    module.configure_model()
    change(module)
    return module


def cast(base):
    return made(base, lambda module: module.model.bfloat16())


def merged(base):
    return made(base, lambda module: module.model.merge_adapter())


def unloaded(base):
    return made(base, lambda module: module.model.merge_and_unload())


def replaced_by_its_base(base):
    return made(base, lambda module: setattr(module, "model", module.model.unload()))


def switched_off(base):
    return made(base, lambda module: module.model.disable_adapter_layers())


def by_lbfgs(base):
    return QLoRAModule(base, optimizer="torch.optim.LBFGS")


CALLBACKS = (
    callbacks.LearningRateFinder(num_training_steps=2),
    callbacks.EarlyStopping("val_loss"),  # without validation
    callbacks.EMAWeightAveraging(),
    callbacks.BackboneFinetuning(),
    callbacks.BatchSizeFinder(),
    callbacks.ModelPruning("l1_unstructured"),
    callbacks.GradientAccumulationScheduler({4: 2}),
)


@pytest.mark.filterwarnings("ignore")  # what Lightning and the compiler warn of on the way
@pytest.mark.parametrize(
    ("build", "options", "key"),
    [
        (OwnStep, {}, "module.training_step"),
        (OwnBackward, {}, "module.backward"),
        (OwnZeroGrad, {}, "module.optimizer_zero_grad"),
        (StepsByHand, {}, "module.automatic_optimization"),
        (TrainsNorms, {}, "adapter.left_out"),
        (BuildsNothing, {}, "model.build"),
        (BuildsMore, {}, "model.build"),
        (LossOfTransformers, {}, "loss.signature"),
        (DropsCallbacks, {}, "module.configure_callbacks"),
        (ForgetsToDivide, {}, "module.optimizer_step"),
        (LeavesEvaluationMode, {}, "model.training"),
        (compiled, {}, "module.training_step"),
        (cast, {}, "adapter.dtype"),
        (TrainsInBFloat16, {}, "adapter.dtype"),
        (merged, {}, "adapter.merged"),
        (unloaded, {}, "adapter.missing"),
        (replaced_by_its_base, {}, "adapter.missing"),
        (switched_off, {}, "adapter.missing"),
        (by_lbfgs, {"accumulate_grad_batches": 2}, "model.optimizer"),
        (QLoRAModule, {"accelerator": "auto", "strategy": SingleDeviceStrategy("mps", Apple())}, "trainer.accelerator"),
        *((QLoRAModule, {"callbacks": callback}, "trainer.callbacks") for callback in CALLBACKS),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_what_would_train_something_else_is_rejected(tiny_base, rows_file, tmp_path, build, options, key):
    with rejects(key):
        fit(build(str(tiny_base)), tmp_path, rows_file, max_steps=1, **options)


class OwnOptimizer(QLoRAModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameter_groups(), lr=1e-3)


@pytest.mark.parametrize(
    ("build", "settings"), [(OwnOptimizer, {}), (QLoRAModule, {"schedule": "constant", "warmup": 2})]
)
def test_a_run_whose_rates_need_no_end_may_end_by_time_alone(tiny_base, rows_file, tmp_path, build, settings):
    options = {"max_epochs": -1, "max_steps": -1, "max_time": {"seconds": 2}}
    trainer = fit(build(str(tiny_base), rank=2, **settings), tmp_path, rows_file, **options)
    assert trainer.global_step


def test_a_callback_that_waits_for_a_validation_that_is_never_reached_is_rejected(tiny_base, rows_file, tmp_path):
    options = {"callbacks": callbacks.EarlyStopping("val_loss"), "val": True, "max_steps": 1, "batch_size": 4}
    with rejects("trainer.callbacks", "val_loss", "step 1"):
        fit(QLoRAModule(str(tiny_base)), tmp_path, rows_file, **options)


class StopsAtOnce(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.should_stop = True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_what_a_callback_of_lightning_shows_otherwise_is_told(train, tmp_path, capsys):
    train(trainer_options={"max_steps": 1})
    assert "model summary" not in capsys.readouterr().out
    shown = {
        "max_steps": 1,
        "log_every_n_steps": 1,
        "enable_model_summary": True,
        "logger": MetricsLogger(tmp_path / "run"),
    }
    train(QLoRAModule, callbacks.LearningRateMonitor(), trainer_options=shown)
    out = capsys.readouterr().out
    assert "Lightning's model summary counts the bytes of packed weights" in out
    assert "LearningRateMonitor logs once more" in out


@pytest.mark.parametrize(
    ("schedule", "max_time", "says"),
    [
        ("cosine", {"hours": 1}, True),
        pytest.param("cosine", None, False, marks=pytest.mark.slow),
        pytest.param("constant_with_warmup", {"hours": 1}, False, marks=pytest.mark.slow),
    ],
)
def test_a_learning_rate_that_may_not_fall_in_time_is_told(train, capsys, schedule, max_time, says):
    train(schedule=schedule, trainer_options={"max_steps": 2, "max_time": max_time})
    assert ("falls over 2 steps" in capsys.readouterr().out) == says


def test_a_warmup_longer_than_the_run_is_rejected_before_the_base_is_loaded(tiny_base, rows_file, tmp_path):
    module = QLoRAModule(str(tiny_base), warmup=100)
    with rejects("model.warmup", "at most 3"):
        fit(module, tmp_path, rows_file, max_steps=3)
    assert module.model is None


@pytest.mark.parametrize(
    ("options", "fact"),
    [({"max_time": {"seconds": 0}}, "trainer.max_time"), ({"callbacks": [StopsAtOnce()]}, "callback")],
)
def test_a_fit_that_takes_no_step_ends_in_an_error(tiny_base, rows_file, tmp_path, options, fact):
    with rejects("fit.steps", "no step", fact):
        fit(QLoRAModule(str(tiny_base)), tmp_path, rows_file, max_epochs=1, **options)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda module: module.to(torch.bfloat16), "bfloat16"),
        (lambda module: module.half(), "float16"),
        (lambda module: module.double(), "float64"),
        (Fabric(accelerator="cpu", devices=1, precision="bf16-true").setup, "bfloat16"),
    ],
    ids=["to", "half", "double", "fabric"],
)
def test_a_module_keeps_its_dtypes(tiny_base, cast, dtype):
    module = make_module(tiny_base)
    with rejects("adapter.dtype", dtype, "model.compute_dtype"):
        cast(module)
    assert {tensor.dtype for tensor in module.parameters()} == {torch.float32, torch.uint8}
    module.to("cpu").float()  # changes nothing


@pytest.mark.slow
def test_an_optimizer_that_computes_the_loss_several_times_trains_on_single_batches(train):
    trainer = train(optimizer="torch.optim.LBFGS", trainer_options={"accumulate_grad_batches": 1, "max_steps": 2})
    assert trainer.global_step == 2


# ---- losses and gradients that are not finite ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "what", "dtype"),
    [
        ({"steps": [2]}, "loss", "fp32"),
        ({"gradient_steps": [2]}, "gradient", "fp32"),
        pytest.param({"steps": [2]}, "loss", "fp16", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run_with_its_rate_and_rows(train, rows_file, fault, what, dtype):
    with rejects(f"{what}.not_finite", "step 2", "rate 0.01") as stop:
        train(Spoilt, diary := Diary(), compute_dtype=dtype, **fault)
    message = str(stop.value)
    assert f"{diary.losses[2]:.4g}" in message
    assert ", ".join(f"{rows_file}:{row + 1}" for row in diary.rows[2]) in message
    assert ("model.compute_dtype" in message) is (dtype == "fp16")
    assert all(tensor.isfinite().all() for tensor in train.module.state_dict().values())


class KeepsAdapters(Callback):
    """Keeps copies of what trains before the first step, and after each; writes a checkpoint at step 4."""

    def __init__(self, file):
        self.file = file

    def on_train_start(self, trainer, pl_module):
        self.copies = [trainable_copies(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, *_):
        if len(self.copies) < trainer.global_step + 1:
            self.copies.append(trainable_copies(pl_module))
        if trainer.global_step == 4 and not self.file.exists():
            trainer.save_checkpoint(self.file)


def trainable_copies(module):
    return torch.cat([tensor.detach().flatten().clone() for tensor in trainable_tensors(module).values()])


def test_in_fp16_a_step_whose_gradient_is_not_finite_is_skipped_at_half_the_scale(train, capsys, tmp_path):
    options = {"max_epochs": 2, "log_every_n_steps": 1, "logger": MetricsLogger(tmp_path / "log")}
    spoilt = {"gradient_steps": [2, 5], "compute_dtype": "fp16"}
    train(Spoilt, kept := KeepsAdapters(tmp_path / "step-4.ckpt"), trainer_options=options, **spoilt)
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(kept.copies)]
    assert moved == [True, True, False, True, True, False, True, True]
    assert capsys.readouterr().out.count("step is skipped") == 1
    scales = [value for _, value in read_metrics(tmp_path / "log" / "metrics.csv")["loss_scale"]]
    assert scales == [32.0, 32.0, 16.0, 16.0, 16.0, 8.0, 8.0, 8.0]
    last = kept.copies[-1]
    train(Spoilt, kept, trainer_options=options | {"ckpt_path": tmp_path / "step-4.ckpt"}, **spoilt)
    assert torch.equal(kept.copies[-1], last)
    assert train.module.loss_scale.value == 8.0


@pytest.mark.slow
def test_ten_skipped_steps_in_a_row_stop_the_run(train):
    with rejects("gradient.not_finite", "step 10", "model.compute_dtype"):
        train(Spoilt, gradient_steps=range(1, 20), compute_dtype="fp16", trainer_options={"max_epochs": 4})
    assert train.module.loss_scale.value == 1 / 32


class SpoiltValidation(QLoRAModule):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.global_step == 4:
            self.statistics.sums["loss"] *= math.nan


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved(train, tmp_path):
    short = {"limit_train_batches": 4, "limit_val_batches": 1}  # two steps an epoch
    options = {"max_epochs": 2, "enable_checkpointing": True, **short}
    with rejects("val_loss.not_finite", "step 4", "nan", "--ckpt_path last"):
        train(SpoiltValidation, AdapterCheckpoint(), val=True, trainer_options=options)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "step-000002.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


# ---- adapters that do not learn --------------------------------------------------------------------------------------


class LosesGradient(Callback):
    """Takes the gradient of one A or B away from some step on, for some steps."""

    def __init__(self, part, steps=math.inf):
        self.part, self.steps = part, steps

    def on_after_backward(self, trainer, pl_module):
        if 4 <= trainer.global_step < 4 + self.steps:
            next(p for name, p in trainable_tensors(pl_module).items() if self.part in name).grad.zero_()


class LeavesOneOut(QLoRAModule):
    def parameter_groups(self):
        return [{"params": list(trainable_tensors(self).values())[1:]}]


@pytest.mark.parametrize(
    ("cls", "added", "key", "step"),
    [
        (QLoRAModule, [LosesGradient(".lora_A.")], "gradient.missing", 6),
        (LeavesOneOut, [], "module.parameter_groups", 0),
    ],
    ids=["A", "optimizer"],
)
def test_adapters_that_would_stay_are_noticed(train, cls, added, key, step):
    with rejects(key, "1 of 28 trainable tensors", "lora_A"):
        train(cls, *added, val=True, trainer_options={"max_epochs": 2})
    assert train.module.trainer.global_step == step


def test_gradients_that_are_zero_by_right_stop_nothing(train):
    """Those of q and k are, if each row of a step has one token before its label."""
    trainer = train(QLoRAModule, LosesGradient(".lora_A.", steps=2), val=True, trainer_options={"max_epochs": 2})
    assert trainer.global_step == 8


def test_a_token_that_the_base_lacks_stops_the_run_and_its_row_is_named(tiny_base):
    """It is only at the end of the row, where no embedding is looked up."""
    module = make_module(tiny_base)
    vocabulary = module.causal_lm.config.vocab_size
    for bad in (vocabulary, -1, vocabulary - 1):
        rows = [[0, 1, 2], [3, 4, bad], [5, 6]]
        batch = collate(*((ids, [-100, *ids[1:]], number) for number, ids in enumerate(rows)))
        is_known = bad == vocabulary - 1
        with contextlib.nullcontext() if is_known else rejects("data.tokenizer", "row 1", f"{bad:,}"):
            module.compute_loss(batch)


class WatchesFilling(Callback):
    """Notes in a step whether torch fills new tensors, and may fail then."""

    def __init__(self, fails):
        self.fails, self.fills = fails, []

    def on_train_batch_end(self, *_):
        self.fills.append(torch.utils.deterministic.fill_uninitialized_memory)
        if self.fails:
            raise MachineFailed


@pytest.mark.parametrize("fails", [False, True])
def test_a_deterministic_run_does_not_fill_new_tensors_and_leaves_torch_as_it_was(
    tiny_base, rows_file, tmp_path, fails
):
    watch = WatchesFilling(fails)
    module = QLoRAModule(str(tiny_base), rank=2)
    try:
        with pytest.raises(MachineFailed) if fails else contextlib.nullcontext():
            fit(module, tmp_path, rows_file, max_steps=1, deterministic=True, callbacks=[watch])
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.fills == [False]
    assert torch.utils.deterministic.fill_uninitialized_memory
