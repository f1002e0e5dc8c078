"""A whole module: every quantization, fp16, a base of one's own; and what would train wrongly is stopped."""

import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lightning import QLoRAModule
from tests.steps import distance, fit, loss_and_gradients, make_batch, make_module, trainable_tensors


def test_in_fp16_the_loss_is_scaled_and_gradients_are_near_those_of_float32(tiny_base):
    exact, half = (make_module(tiny_base, compute_dtype=dtype) for dtype in ("fp32", "fp16"))
    assert (exact.loss_scale, half.loss_scale) == (1.0, 32.0)
    of_exact, of_half = (loss_and_gradients(module)[1] for module in (exact, half))
    assert distance(of_half, of_exact) <= 0.05


@pytest.mark.parametrize(
    "quantization",
    [
        "nf4",
        pytest.param("fp4", marks=pytest.mark.slow),
        pytest.param("int8", marks=pytest.mark.slow),
        pytest.param("none", marks=pytest.mark.slow),
    ],
)
def test_every_quantization_trains_every_adapter_and_validation_judges_what_is_trained(
    tiny_base, rows_file, tmp_path, quantization
):
    module = QLoRAModule(str(tiny_base), quantization=quantization, compute_dtype="bf16", warmup_ratio=0.0)
    # four steps: the checks of B, and then of A, have passed
    trainer = fit(module, tmp_path, rows_file, val=True, batch_size=4, max_epochs=1)
    assert all(tensor.any() for tensor in trainable_tensors(module).values())
    module.train()
    sums = [module.compute_loss(batch) for batch in trainer.datamodule.val_dataloader()]
    loss = sum(s.nll_sum.double() for s in sums) / sum(s.labelled_tokens for s in sums)
    assert trainer.callback_metrics["val_loss"] == loss.float()


class ForgetsToDivide(QLoRAModule):
    def on_before_optimizer_step(self, optimizer):
        """Say nothing to the parent."""


class LeavesEvaluationMode(QLoRAModule):
    def on_train_start(self):
        self.model.eval()


@pytest.mark.parametrize(
    ("cls", "sentence"), [(ForgetsToDivide, "without calling `super"), (LeavesEvaluationMode, "evaluation mode")]
)
def test_what_would_train_wrongly_is_stopped(tiny_base, rows_file, tmp_path, cls, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        fit(cls(str(tiny_base), warmup_ratio=0.0), tmp_path, rows_file, max_epochs=1)


class OwnBase(QLoRAModule):
    """A base that transformers has loaded with its own attention."""

    def build_model(self):
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        assert base.config._attn_implementation == "sdpa"
        with warnings.catch_warnings(action="ignore"):
            return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("fast", [True, False])
def test_an_own_base_attends_within_samples(tiny_base, fast):
    ours = make_module(tiny_base, quantization="none")
    own = OwnBase(str(tiny_base), fast=fast)
    own.configure_model()
    with ours.model.disable_adapter(), own.model.disable_adapter():
        expected = ours.compute_loss(make_batch()).nll_sum.item()
        assert own.compute_loss(make_batch()).nll_sum.item() == pytest.approx(expected, rel=1e-5)


class LogsItsOwn(QLoRAModule):
    def validation_step(self, batch, batch_idx):
        self.log("val_tokens", float(batch["input_ids"].numel()), batch_size=1)


def test_an_own_validation_step_logs_what_it_likes(tiny_base, rows_file, tmp_path):
    trainer = fit(LogsItsOwn(str(tiny_base)), tmp_path, rows_file, val=True, max_epochs=1)
    assert {name for name in trainer.callback_metrics if name.startswith("val_")} == {"val_tokens"}
