"""A run that would train on for nothing is stopped: by losses, gradients, settings, token ids, a base that changes."""

import contextlib
import copy
import json
import logging
import math

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from qlora_lightning import AdapterCheckpoint, GradientCheckpointing, InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.model.guards.checks import check_frozen, check_gradients, check_trainer, checksum_frozen
from qlora_lightning.model.guards.nonfinite import describe_findings
from qlora_lightning.model.load.base_model import load_base
from qlora_lightning.support.errors import UserError
from tests.equality import same
from tests.flat import collate
from tests.steps import make_module, make_trainer


class Spoilt(QLoRAModule):
    """The loss of a row, of steps, or the gradient of a step is not finite."""

    def __init__(self, base, row=None, steps=(), gradient_step=None, **settings):
        super().__init__(base, **settings)
        self.row, self.steps, self.gradient_step = row, steps, gradient_step

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        bad = self.row in batch["row_ids"].tolist() or self.trainer.global_step in self.steps
        nll = sums.nll_sum * math.inf if bad else sums.nll_sum
        if self.trainer.global_step == self.gradient_step:
            nll.register_hook(lambda gradient: gradient * math.nan)
        return LossSums(nll, *sums[1:])


@pytest.fixture
def fit(tiny_base, rows_file, tmp_path):
    """Train the tiny base on sixteen rows, two a micro-batch, two of these a step: four steps an epoch."""

    def run(cls=QLoRAModule, *callbacks, val=False, ckpt_path=None, trainer_options=None, **settings):
        lightning.seed_everything(7, verbose=False)
        defaults = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup_ratio": 0.0}
        module = cls(str(tiny_base), **{**defaults, "schedule": "constant", **settings})
        split = {"train": str(rows_file), "val": str(rows_file) if val else None}
        data = InstructionDataModule(**split, tokenizer=str(tiny_base), batch_size=2)
        options = {"max_epochs": 1, "accumulate_grad_batches": 2, "callbacks": list(callbacks)}
        trainer = make_trainer(tmp_path / "run", **(options | (trainer_options or {})))
        try:
            trainer.fit(module, data, ckpt_path=ckpt_path)
        finally:
            run.trainer, run.module = trainer, module
        return trainer, module

    return run


# ---- losses and gradients that are not finite ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_its_row_is_written_down(fit, tmp_path, rows_file):
    with pytest.raises(UserError) as stop:
        fit(Spoilt, row=4)
    step = fit.trainer.global_step
    file = tmp_path / "run" / f"nonfinite-step-{step}.json"
    for fact in (f"loss of step {step}, at learning rate 0.01, is NaN", f"rows: {rows_file}:5.", f"text: {file}."):
        assert fact in str(stop.value)
    rank = json.loads(file.read_text())["ranks"][0]
    assert [row["row_id"] for row in rank["rows"]] == [4]
    assert "Count to 5." in rank["rows"][0]["text"]
    assert len(rank["window_rows"]) == 4
    assert all(tensor.isfinite().all() for tensor in fit.module.state_dict().values())


NORM = "base_model.model.model.layers.1.input_layernorm"


class SpoilOutput(Callback):
    """Lets a norm of the base give an infinity."""

    def on_train_start(self, trainer, pl_module):
        pl_module.get_submodule(f"model.{NORM}").register_forward_hook(lambda *_: _[2] * math.inf)


@pytest.mark.parametrize(
    ("cls", "callbacks", "settings", "words"),
    [
        (QLoRAModule, [SpoilOutput(), GradientCheckpointing()], {}, rf"loss of step 0.*First module: {NORM}; rows: \S"),
        (Spoilt, [], {"gradient_step": 2}, r"gradient of step 2.*First module: none, all outputs are finite; rows: "),
    ],
    ids=["module", "gradient"],
)
def test_the_first_module_that_gave_it_is_named(fit, cls, callbacks, settings, words):
    with pytest.raises(UserError, match=words):
        fit(cls, *callbacks, **settings)


def test_of_several_ranks_those_that_found_something_speak_and_else_all_rows_are_named():
    def finding(window, micro_batch=None, **found):
        return {"window_rows": window, "micro_batch": micro_batch, "module": None, "rows": [], "error": None, **found}

    nothing = finding(["a.jsonl:1"])
    found = finding(["a.jsonl:2", "a.jsonl:3"], 0, module="m.q", rows=[{"place": "a.jsonl:3"}])
    assert describe_findings([nothing, found]).startswith("First module: m.q; rows: a.jsonl:3. ")
    nobody = describe_findings([nothing, finding(["a.jsonl:2"])])
    assert nobody.startswith("Run again, each micro-batch is finite; rows: a.jsonl:1, a.jsonl:2. ")


class Copies(Callback):
    """Copies adapters and optimizer after each step."""

    def __init__(self):
        self.copies = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = copy.deepcopy(trainer.optimizers[0].state_dict())
        adapters = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.copies[trainer.global_step] = adapters, state["state"], state["param_groups"][0]["lr"]


@pytest.mark.parametrize("fault", [{"steps": [2]}, {"gradient_step": 2}])
def test_a_skipped_step_moves_nothing_but_the_schedule_and_is_counted(fit, fault, caplog):
    options = {"schedule": "linear", "on_nonfinite": "skip", "weight_decay": 0.1}
    with caplog.at_level(logging.WARNING, "qlora_lightning"):
        trainer, module = fit(Spoilt, seen := Copies(), **options, **fault)
    (adapters, state, rate), (later, state_later, next_rate) = seen.copies[2], seen.copies[3]
    assert same(later, adapters)
    assert same(state_later, state)
    assert next_rate < rate
    assert not same(seen.copies[4][0], later)
    assert trainer.callback_metrics["skipped_steps"] == 1
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert "step 2, at learning rate" in caplog.text
    assert not any(part._forward_hooks for part in module.modules())  # of the search: such layers would stay slow


def test_ten_skipped_steps_are_written_down_and_the_twentieth_in_a_row_stops_resumes_counted(fit, tmp_path):
    trainer, module = fit(Spoilt, steps=[0, 2, 3], on_nonfinite="skip")
    assert module.guard.state_dict() == {"skipped_steps": 3, "skipped_in_a_row": 2}
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    resumed = {"ckpt_path": tmp_path / "x.ckpt", "trainer_options": {"max_epochs": 6}}
    with pytest.raises(UserError, match=r"step 21, .* is NaN or infinite. So were the 20 steps up to it"):
        fit(Spoilt, steps=range(4, 99), on_nonfinite="skip", **resumed)
    assert len(list((tmp_path / "run").glob("nonfinite-step-*.json"))) == 10


class Scaler(Callback):
    """Stands for 16-mixed, which a CPU does not have."""

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.scaler = object()


def test_under_a_scaler_which_skips_steps_itself_only_the_loss_counts(fit):
    _, module = fit(Spoilt, Scaler(), gradient_step=3)  # the last step: nothing comes of it
    assert module.guard.skipped_steps == 0
    with pytest.raises(UserError, match="The loss of step 2"):
        fit(Spoilt, Scaler(), steps=[2])


class SpoiltValidation(QLoRAModule):
    """The loss of the second validation is not finite."""

    validations = 0

    def on_validation_epoch_end(self):
        self.validations += 1
        if self.validations == 2:
            self.val_statistics.nll_sum *= math.nan
        super().on_validation_epoch_end()


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_saved_but_by_skip(fit, tmp_path):
    short = {"limit_train_batches": 4, "limit_val_batches": 1}  # two steps an epoch
    options = {"max_epochs": 2, "enable_checkpointing": True, **short}
    with pytest.raises(UserError, match=r"validation at step 4 gave a val_loss of nan\. .*--ckpt_path last"):
        fit(SpoiltValidation, AdapterCheckpoint(), val=True, trainer_options=options)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "step-000002.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    trainer, _ = fit(SpoiltValidation, val=True, on_nonfinite="skip", trainer_options={"max_epochs": 3, **short})
    assert trainer.global_step == 6


# ---- what stays, and what changes ------------------------------------------------------------------------------------


class ChangeBase(Callback):
    """Writes to a frozen weight at some hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module, *_: self.change(pl_module))

    def change(self, pl_module):
        pl_module.get_parameter("model.base_model.model.model.norm.weight").data += 1


class LosesGradient(Callback):
    """Takes the gradient of one B away from some step on."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step >= 4:
            next(p for name, p in trainable_tensors(pl_module).items() if ".lora_B." in name).grad.zero_()


class LeavesOneOut(QLoRAModule):
    def parameter_groups(self):
        return [{"params": list(trainable_tensors(self).values())[1:]}]


CHANGED = r"1 of \d+ frozen tensors changed during training, as .*model\.norm\.weight"


@pytest.mark.parametrize(
    ("cls", "callbacks", "val", "words", "step"),
    [
        (QLoRAModule, [ChangeBase("on_validation_start")], True, CHANGED, 4),
        (QLoRAModule, [ChangeBase("on_train_epoch_end")], False, CHANGED, 8),
        (QLoRAModule, [LosesGradient()], True, r"1 of 28 trainable tensors get no gradient", 4),
        (LeavesOneOut, [], False, r"1 of 28 trainable tensors are in none .*Let `parameter_groups` return", 0),
    ],
    ids=["base at a validation", "base at the end", "gradient behind a validation", "optimizer"],
)
def test_what_changed_that_should_not_or_would_stay_is_noticed(fit, cls, callbacks, val, words, step):
    with pytest.raises(RuntimeError, match=words):
        fit(cls, *callbacks, val=val, trainer_options={"max_epochs": 2})
    assert fit.trainer.global_step == step


def test_adapters_that_diverge_are_reported_so_and_no_wiring_is_blamed(fit):
    with pytest.raises(RuntimeError, match=r"Training has diverged, to weights up to .*: lower model\.learning_rate"):
        fit(QLoRAModule, val=True, learning_rate=1e10, trainer_options={"max_epochs": 3})


class NothingLabelled(QLoRAModule):
    def compute_loss(self, batch):
        return super().compute_loss({**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_a_window_without_labels_is_no_dead_gradient(fit):
    fit(NothingLabelled, trainer_options={"max_steps": 2})


# ---- the checks ------------------------------------------------------------------------------------------------------


def test_precisions_that_train_pass_but_16_mixed_in_several_processes():
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        check_trainer(precision, SingleDeviceStrategy, "nf4")
    check_trainer("bf16-mixed", DDPStrategy, "nf4", processes=2)
    with pytest.raises(UserError, match="2 processes"):
        check_trainer("16-mixed", DDPStrategy, "nf4", processes=2)


def test_a_token_that_the_base_lacks_stops_the_run_and_its_row_is_named(tiny_base):
    """It is only at the end of the row, where no embedding is looked up."""
    module = make_module(tiny_base)
    vocabulary = module.causal_lm.config.vocab_size
    for bad in (vocabulary, -1, vocabulary - 1):
        rows = [[0, 1, 2], [3, 4, bad], [5, 6]]
        batch = collate(*((ids, [-100, *ids[1:]], number) for number, ids in enumerate(rows)))
        words = f"A token of .*1.* has the id {bad:,}, .*tokens that the base lacks"
        with pytest.raises(UserError, match=words) if bad != vocabulary - 1 else contextlib.nullcontext():
            module.compute_loss(batch)


# ---- gradients -------------------------------------------------------------------------------------------------------


def parameter(value, gradient):
    made = nn.Parameter(torch.full((2,), value))
    made.grad = None if gradient is None else torch.full((2,), gradient)
    return made


def adapter(a_gradient, b, b_gradient, name="q_proj"):
    return {
        f"{name}.lora_A.default.weight": parameter(1.0, a_gradient),
        f"{name}.lora_B.default.weight": parameter(b, b_gradient),
    }


WAITS = adapter(a_gradient=0.0, b=0.0, b_gradient=1.0)  # A's gradient is zero while B is
ALIVE = adapter(a_gradient=1.0, b=0.1, b_gradient=1.0, name="v_proj")
EMBEDDING = {"modules_to_save.default.weight": parameter(1.0, 0.0)}  # all its rows may be absent


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        (WAITS | ALIVE, False),  # it is asked again until every B has moved
        (ALIVE | EMBEDDING, True),
        (adapter(a_gradient=0.0, b=0.0, b_gradient=0.0), "1 of 2 .*lora_B"),
        (adapter(a_gradient=0.0, b=0.1, b_gradient=1.0), "1 of 2 .*lora_A"),
        (adapter(a_gradient=0.0, b=0.1, b_gradient=0.0, name="k_proj") | WAITS | ALIVE, "2 of 6 .*k_proj.*k_proj"),
        ({"modules_to_save.default.weight": parameter(1.0, None)}, "1 of 1 .*modules_to_save"),
    ],
)
def test_adapters_without_gradient_are_named_and_living_ones_pass(adapters, expected):
    if isinstance(expected, bool):
        assert check_gradients(adapters) is expected
        return
    with pytest.raises(RuntimeError, match=expected):
        check_gradients(adapters)


# ---- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "double_quant", "scales"),
    [("nf4", True, {"absmax", "nested_absmax", "offset"}), ("nf4", False, {"absmax"}), ("int8", False, {"SCB"})],
)
def test_the_scales_of_quantized_weights_count_and_a_forward_changes_nothing(
    tiny_base, quantization, double_quant, scales
):
    options = {"quantization": quantization, "double_quant": double_quant, "compute_dtype": torch.float32}
    base = load_base(str(tiny_base), **options).model
    base.requires_grad_(False)
    before = checksum_frozen(base)
    name = "model.layers.0.mlp.up_proj.weight"
    assert {key.removeprefix(f"{name}.") for key in before if key.startswith(f"{name}.")} == scales
    base(input_ids=torch.tensor([[5, 6, 7]]))  # of int8 it moves the scales from the weights to their modules
    check_frozen(before, checksum_frozen(base))
    module = base.model.layers[0].mlp.up_proj
    scale = module.state.SCB if quantization == "int8" else module.weight.quant_state.absmax
    scale[0] += 1
    with pytest.raises(RuntimeError, match=r"up_proj\.weight\.(absmax|SCB)"):
        check_frozen(before, checksum_frozen(base))
