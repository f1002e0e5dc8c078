"""A whole module: its loss is plain transformers' row by row, in a batch as alone, however a step is cut."""

import itertools

import lightning
import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.adapters.lora import trainable_tensors
from qlora_lightning.support.errors import UserError
from qlora_lightning.support.versions import without_peft_warnings
from tests.steps import assert_same_step, distance, loss_and_gradients, make_batch, make_module, make_trainer


@pytest.fixture
def batch():
    """Four samples whose prompts have no labels."""
    made = make_batch((7, 19, 2, 30), vocabulary=40_000)
    for start, prompt in zip(made["cu_seqlens"].tolist(), (3, 4, 1, 11), strict=False):
        made["labels"][0, start : start + prompt] = -100
    return made


def rows_of(batch):
    bounds = batch["cu_seqlens"].tolist()
    for start, end in itertools.pairwise(bounds):
        yield batch["input_ids"][:, start:end], batch["labels"][:, start:end]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_loss_and_gradients_equal_those_of_the_plain_model_row_by_row(tiny_base, batch, quantization):
    module, plain = (make_module(tiny_base, quantization=quantization, fast=fast) for fast in (True, False))
    plain.causal_lm.set_attn_implementation("eager")
    expected, tokens = torch.zeros(()), 0
    for ids, labels in rows_of(batch):  # Hugging Face's own forward over whole logits, PEFT's own layers
        logits = plain.model(input_ids=ids).logits
        expected = expected + F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        tokens += int((labels != -100).sum())
    assert module.compute_loss(batch).labelled_tokens == tokens
    gradients = torch.autograd.grad(expected, list(trainable_tensors(plain).values()))
    flat = torch.cat([each.flatten() for each in gradients])
    assert_same_step(loss_and_gradients(module, batch), (float(expected.detach()) / tokens, flat))


@pytest.fixture
def fit_adapter(tiny_base, rows_file, tmp_path):
    """Three steps on 16 ragged rows; returns the adapter before and after, as one vector each."""

    def adapter_of(module):
        return torch.cat([tensor.flatten() for tensor in module.state_dict().values()])

    def fit(batch_size, accumulate):
        lightning.seed_everything(1, verbose=False)
        module = QLoRAModule(str(tiny_base), compute_dtype="fp32", learning_rate=1e-2, warmup_ratio=0.0)
        data = InstructionDataModule(train=str(rows_file), tokenizer=str(tiny_base), batch_size=batch_size)
        options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
        trainer = make_trainer(tmp_path, **options)
        module.configure_model()
        before = adapter_of(module)
        trainer.fit(module, data)
        assert trainer.global_step == 3  # windows of 6, 6 and a short one of 4
        return before, adapter_of(module)

    return fit


def test_batch_accumulation_and_the_scale_of_the_loss_change_no_step(fit_adapter, monkeypatch):
    before, whole = fit_adapter(6, 1)
    assert not torch.equal(before, whole)
    for batch_size, accumulate in ((1, 6), (2, 3)):
        _, cut = fit_adapter(batch_size, accumulate)
        assert (whole - cut).norm() <= 1e-4 * (whole - before).norm()
    monkeypatch.setattr(QLoRAModule, "loss_scale", 32.0)
    assert torch.equal(fit_adapter(2, 3)[1], cut)  # in float32 a power of two changes no bit


def test_in_fp16_the_loss_is_scaled_and_gradients_are_near_those_of_float32(tiny_base, batch):
    exact, half = (make_module(tiny_base, compute_dtype=dtype) for dtype in ("fp32", "fp16"))
    assert (exact.loss_scale, half.loss_scale) == (1.0, 32.0)
    of_exact, of_half = (loss_and_gradients(module, batch)[1] for module in (exact, half))
    assert distance(of_half, of_exact) <= 0.05


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_every_quantization_trains_every_adapter_and_validation_judges_what_is_trained(
    tiny_base, rows_file, tmp_path, quantization
):
    module = QLoRAModule(str(tiny_base), quantization=quantization, compute_dtype="bf16", warmup_ratio=0.0)
    data = InstructionDataModule(train=str(rows_file), val=str(rows_file), tokenizer=str(tiny_base), batch_size=4)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)  # four steps: the checks of B, and then of A, have passed
    assert all(tensor.any() for tensor in trainable_tensors(module).values())
    module.train()
    sums = [module.compute_loss(batch) for batch in data.val_dataloader()]
    loss = sum(s.nll_sum.double() for s in sums) / sum(s.labelled_tokens for s in sums)
    assert trainer.callback_metrics["val_loss"] == loss.float()


def test_validation_loss_depends_neither_on_batch_size_nor_on_order(tiny_base, rows_file, tmp_path):
    module = make_module(tiny_base)
    lines = rows_file.read_text().splitlines()
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(lines)) + "\n")
    losses = []
    for file, size in ((rows_file, 16), (rows_file, 3), (turned, 5)):
        data = InstructionDataModule(val=str(file), tokenizer=str(tiny_base), batch_size=size)
        losses.append(make_trainer(tmp_path).validate(module, data, verbose=False)[0]["val_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


class ForgetsToDivide(QLoRAModule):
    def on_before_optimizer_step(self, optimizer):
        """Say nothing to the parent."""


class LeavesEvaluationMode(QLoRAModule):
    def on_train_start(self):
        self.model.eval()


@pytest.mark.parametrize(
    ("module", "precision", "error", "sentence"),
    [
        (ForgetsToDivide, "32-true", RuntimeError, "without calling `super"),
        (LeavesEvaluationMode, "32-true", RuntimeError, "evaluation mode"),
        (QLoRAModule, "bf16-true", UserError, "bf16-true"),  # it would cast the masters
    ],
)
def test_what_would_train_wrongly_is_stopped(tiny_base, rows_file, tmp_path, module, precision, error, sentence):
    data = InstructionDataModule(train=str(rows_file), tokenizer=str(tiny_base))
    with pytest.raises(error, match=sentence):
        make_trainer(tmp_path, precision=precision, max_epochs=1).fit(module(str(tiny_base), warmup_ratio=0.0), data)


class OwnBase(QLoRAModule):
    """A base that transformers has loaded with its own attention."""

    def build_model(self):
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        assert base.config._attn_implementation == "sdpa"
        with without_peft_warnings():
            return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("fast", [True, False])
def test_an_own_base_attends_within_samples(tiny_base, batch, fast):
    ours = make_module(tiny_base, quantization="none")
    own = OwnBase(str(tiny_base), fast=fast)
    own.configure_model()
    with ours.model.disable_adapter(), own.model.disable_adapter():
        expected = ours.compute_loss(batch).nll_sum.item()
        assert own.compute_loss(batch).nll_sum.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own compiler, when it is made
def test_a_compiled_module_is_rejected(tiny_base, rows_file, tmp_path):
    module = torch.compile(QLoRAModule(str(tiny_base)))
    with pytest.raises(UserError, match=r"compiled by torch\.compile, .*set model\.fast to false"):
        make_trainer(tmp_path, max_epochs=1).fit(
            module, InstructionDataModule(str(rows_file), tokenizer=str(tiny_base))
        )
