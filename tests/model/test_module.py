"""A whole module: every quantization, fp16, a base of one's own; and what would train wrongly is stopped."""

import shutil
import warnings

import lightning
import peft
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lightning import AdapterCheckpoint, GradientCheckpointing, LossSums, QLoRAModule, load_base
from tests.equality import base_tensors, same
from tests.errors import rejects
from tests.steps import distance, fit, loss_and_gradients, make_batch, make_module, trainable_tensors


def test_in_fp16_the_loss_is_scaled_and_gradients_are_near_those_of_float32(tiny_base):
    exact, half = (make_module(tiny_base, compute_dtype=dtype) for dtype in ("fp32", "fp16"))
    assert (exact.loss_scale.value, half.loss_scale.value) == (1.0, 32.0)
    of_exact, of_half = (loss_and_gradients(module)[1] for module in (exact, half))
    assert distance(of_half, of_exact) <= 0.05


QUANTIZATIONS = ["nf4", *(pytest.param(each, marks=pytest.mark.slow) for each in ("fp4", "int8", "none"))]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_quantization_trains_every_adapter_and_no_bit_of_the_base(tiny_base, rows_file, tmp_path, quantization):
    """And is judged by what is trained."""
    module = QLoRAModule(str(tiny_base), quantization=quantization, compute_dtype="bf16", warmup=0.0)
    module.configure_model()
    base = base_tensors(module)
    # four steps: the checks of B, and then of A, have passed
    trainer = fit(module, tmp_path, rows_file, val=True, batch_size=4, max_epochs=1)
    assert all(tensor.any() for tensor in trainable_tensors(module).values())
    assert same(base_tensors(module), base)
    module.train()
    sums = [module.compute_loss(batch) for batch in trainer.datamodule.val_dataloader()]
    loss = sum(s.loss_sum.double() for s in sums) / sum(s.count for s in sums)
    assert trainer.callback_metrics["val_loss"] == loss.float()


class Clips(Callback):
    """Clips to a norm of 0.1, and notes the norm before."""

    def __init__(self):
        self.seen, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 0.1))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.logged.append(trainer.callback_metrics.get("grad_norm"))


class KeepsItsHooksToItself(QLoRAModule):
    """Overrides hooks without ``super()``."""

    def ignore(self, *_, **options):
        pass

    setup = on_fit_start = on_train_start = on_validation_start = on_validation_epoch_end = ignore
    on_before_optimizer_step = ignore


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_callback_sees_and_changes_the_gradients_of_the_mean(tiny_base, rows_file, tmp_path, dtype):
    def train(cls, **options):
        lightning.seed_everything(7, verbose=False)
        module = cls(str(tiny_base), rank=2, compute_dtype=dtype, warmup=0.0)
        fit(module, tmp_path, rows_file, max_epochs=1, accumulate_grad_batches=2, **options)
        return module.state_dict()

    callbacks = [callback := Clips(), GradientCheckpointing(True), EarlyStopping("val_loss", patience=9)]
    clipped = train(KeepsItsHooksToItself, val=True, callbacks=callbacks)
    assert same(clipped, train(QLoRAModule, gradient_clip_val=0.1))
    assert callback.seen == callback.logged[1::2]
    assert len(callback.seen) == 4


class Scales(QLoRAModule):
    """Trains a parameter beside the model, and runs out of memory in a micro-batch."""

    fails = False

    def __init__(self, base):
        super().__init__(base, rank=2, compute_dtype="fp32", warmup=0.0)
        self.scale, self.gradients = torch.nn.Parameter(torch.ones(())), []

    def parameter_groups(self):
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def compute_loss(self, batch):
        if self.fails and len(batch.counts) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sums = super().compute_loss(batch)
        return LossSums(self.scale * sums.loss_sum, sums.count)

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None  # the rest of the epoch is left out, inside a window

    def on_before_optimizer_step(self, optimizer):
        mean = self.trainer.callback_metrics["train_loss"] / self.scale.detach()
        self.gradients.append(float(self.scale.grad - mean))


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_are_cleared_with_the_window_wherever_a_parameter_is(tiny_base, rows_file, tmp_path, fails):
    module = Scales(str(tiny_base))
    module.fails = fails
    fit(module, tmp_path, rows_file, max_epochs=2, accumulate_grad_batches=2)
    assert module.gradients == pytest.approx([0.0] * len(module.gradients), abs=1e-4)  # its gradient is the mean loss
    assert len(module.gradients) == 2


class OwnBase(QLoRAModule):
    """A base that transformers has loaded with its own attention."""

    def build_model(self):
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        assert base.config._attn_implementation == "sdpa"
        with warnings.catch_warnings(action="ignore"):
            return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("fast", [True, False])
def test_an_own_base_attends_within_samples(tiny_base, fast):
    ours, own = make_module(tiny_base, quantization="none"), make_module(tiny_base, cls=OwnBase, fast=fast)
    with ours.model.disable_adapter(), own.model.disable_adapter():
        expected = ours.compute_loss(make_batch()).loss_sum.item()
        assert own.compute_loss(make_batch()).loss_sum.item() == pytest.approx(expected, rel=1e-5)


class Plain(QLoRAModule):
    """A base without adapters, from wherever, whose packed weights bitsandbytes would change in an evaluation."""

    def build_model(self):
        in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16, quantization_config=in_4_bits)


def test_an_own_base_gets_adapters_is_saved_and_resumes_on_no_other(tiny_base, rows_file, tmp_path):
    shutil.copytree(tiny_base, other := tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.model.norm.weight.data *= 1.01
    model.save_pretrained(other)

    def train(base, **options):
        module = Plain(str(base), rank=2)
        module.configure_model()
        before, options["callbacks"] = base_tensors(module), [AdapterCheckpoint()]
        fit(module, tmp_path, rows_file, val=True, batch_size=8, enable_checkpointing=True, **options)
        assert same(base_tensors(module), before)

    train(tiny_base, max_epochs=1)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    with rejects("adapter.base"):
        train(other, max_epochs=2, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    for kind, base in ((Plain, other), (QLoRAModule, tiny_base)):  # the latter has it from the files, in other bits
        with rejects("adapter.base"):
            kind(str(base), quantization="nf4", adapter=str(tmp_path / "adapter")).configure_model()
    with rejects("model.rank", "3", "2"):
        Plain(str(tiny_base), rank=3, adapter=str(tmp_path / "adapter")).configure_model()


class OwnAdapters(QLoRAModule):
    def build_model(self):
        base = load_base(self.base, compute_dtype=torch.float32).model
        return peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of transformers, asked by PEFT 0.21
def test_other_adapters_of_peft_are_saved_and_resumed(tiny_base, rows_file, tmp_path):
    for max_epochs, checkpoint in ((1, None), (2, tmp_path / "checkpoints" / "last.ckpt")):
        options = {"callbacks": [AdapterCheckpoint()], "enable_checkpointing": True, "max_epochs": max_epochs}
        module = OwnAdapters(str(tiny_base))
        fit(module, tmp_path, rows_file, batch_size=8, ckpt_path=checkpoint, **options)
    with warnings.catch_warnings(action="ignore"):  # of PEFT's: transformers' own task types
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "adapter")
    stored = {name: tensor for name, tensor in model.named_parameters() if "ia3_l" in name}
    assert stored
    assert all(torch.equal(tensor, module.model.get_parameter(name)) for name, tensor in stored.items())


class CountsRows(QLoRAModule):
    def __init__(self, base, name="rows", **settings):
        super().__init__(base, **settings)
        self.name = name

    def compute_loss(self, batch):
        sums = super().compute_loss(batch)
        return LossSums(sums.loss_sum, sums.count, {**sums.metrics, self.name: torch.tensor(len(batch.rows))})


def test_what_an_objective_logs_comes_beside_the_usual_metrics(tiny_base, rows_file, tmp_path):
    logger = CSVLogger(tmp_path)
    options = {"val": True, "batch_size": 8, "max_epochs": 1, "logger": logger, "log_every_n_steps": 1}
    metrics = fit(CountsRows(str(tiny_base), rank=2), tmp_path, rows_file, **options).callback_metrics
    usual = {"val_perplexity", "train_token_accuracy", "val_token_accuracy"}
    assert usual | {"train_rows", "val_rows"} <= metrics.keys()
    assert logger.experiment.hparams["rank"] == 2  # by which runs are told apart
    with rejects("loss.metrics", "perplexity"):
        fit(CountsRows(str(tiny_base), name="perplexity"), tmp_path, rows_file, max_steps=1)


class LogsItsOwn(QLoRAModule):
    def validation_step(self, batch, batch_idx):
        self.log("val_tokens", float(batch["input_ids"].numel()), batch_size=1)


def test_an_own_validation_step_logs_what_it_likes(tiny_base, rows_file, tmp_path):
    trainer = fit(LogsItsOwn(str(tiny_base)), tmp_path, rows_file, val=True, max_epochs=1)
    assert {name for name in trainer.callback_metrics if name.startswith("val_")} == {"val_tokens"}
