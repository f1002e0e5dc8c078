"""What a researcher who knows Lightning writes first trains what it says, or is rejected with what to do instead."""

import lightning
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM

from qlora_lightning import LossSums, QLoRAModule, load_base
from tests.equality import same
from tests.errors import rejects
from tests.steps import fit

_SETTINGS = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2}


# ---- other losses ----------------------------------------------------------------------------------------------------


class Focal(QLoRAModule):
    def compute_loss(self, batch):
        nll, correct = self.token_losses(batch)
        return LossSums.of((1 - (-nll).exp()) ** 2 * nll, nll=nll, token_accuracy=correct)


class Smoothed(QLoRAModule):
    def compute_loss(self, batch):
        hidden, targets = self.last_states(batch)
        logits = self.causal_lm.lm_head(hidden)
        return LossSums.of(F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none"))


class Distilled(QLoRAModule):
    def compute_loss(self, batch):
        hidden, _ = self.last_states(batch)
        with torch.no_grad(), self.model.disable_adapter():
            teacher, _ = self.last_states(batch)
        student, teacher = (self.causal_lm.lm_head(states).log_softmax(-1) for states in (hidden, teacher))
        nll, _ = self.token_losses(batch)
        return LossSums.of(nll + F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1))


class EntropyBonus(QLoRAModule):
    def compute_loss(self, batch):
        hidden, targets = self.last_states(batch)
        log_probs = self.causal_lm.lm_head(hidden).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return LossSums.of(F.nll_loss(log_probs, targets, reduction="none") - 0.01 * entropy, entropy=entropy)


class OfRows(QLoRAModule):
    """Each row weighs the same, however long its answer is."""

    def compute_loss(self, batch):
        nll, _ = self.token_losses(batch)
        return LossSums.of(torch.stack([row.mean() for row in nll.split(batch.counts)]))


class Weighted(QLoRAModule):
    def compute_loss(self, batch):
        nll, _ = self.token_losses(batch)
        weights = (batch.targets % 7 + 1) / 7
        return LossSums((weights * nll).sum(), weights.sum())


class Scheduled(QLoRAModule):
    """A term that grows with the steps."""

    def compute_loss(self, batch):
        nll, _ = self.token_losses(batch)
        return LossSums.of(nll + self.global_step * nll.square())


class ValueHead(QLoRAModule):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.value_head = nn.Linear(64, 1)

    def compute_loss(self, batch):
        hidden, _ = self.last_states(batch)
        nll, _ = self.token_losses(batch)
        error = (self.value_head(hidden.float())[:, 0] - nll.detach()).square()
        return LossSums.of(nll + error, value_error=error)


# ---- other models ----------------------------------------------------------------------------------------------------


class OwnLoRA(QLoRAModule):
    def build_model(self):
        base = load_base(self.base, compute_dtype=torch.float32).model
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


class BaseOfTransformers(QLoRAModule):
    def build_model(self):
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32, use_kernels=False)


# ---- another optimization, other figures -----------------------------------------------------------------------------


class Groups(QLoRAModule):
    def parameter_groups(self):
        named = [(name, each) for name, each in self.named_parameters() if each.requires_grad]
        a = [each for name, each in named if ".lora_A." in name]
        b = [each for name, each in named if ".lora_A." not in name]
        return [{"params": a}, {"params": b, "lr": 4 * self.learning_rate}]


class OwnOptimizer(QLoRAModule):
    def configure_optimizers(self):
        optimizer = torch.optim.NAdam(self.parameter_groups(), lr=0.1)
        schedule = OneCycleLR(optimizer, 0.1, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OwnFigures(QLoRAModule):
    def on_before_optimizer_step(self, optimizer):
        norms = [each.grad.norm() for name, each in self.named_parameters() if ".lora_B." in name]
        self.log("norm_of_b", torch.stack(norms).max())

    def on_train_epoch_end(self):
        self.log("epochs_done", float(self.current_epoch + 1))


class OwnValidation(QLoRAModule):
    def validation_step(self, batch, batch_idx):
        sums = self.sum_loss(self.micro_batch_of(batch))
        self.log("val_mine", sums.loss_sum / sums.count, batch_size=int(sums.count))


CLASSES = [
    (ValueHead, {"train_value_error", "val_value_error"}, {"val_perplexity"}),
]
MORE = [
    (Focal, {"train_perplexity", "val_perplexity", "train_token_accuracy"}, set()),
    (OwnLoRA, {"train_perplexity", "val_perplexity"}, set()),
    (OwnOptimizer, {"train_perplexity", "val_perplexity"}, set()),
    (Smoothed, {"val_loss"}, {"val_perplexity", "train_perplexity"}),
    (Distilled, {"val_loss"}, {"val_perplexity"}),
    (EntropyBonus, {"train_entropy", "val_entropy"}, {"train_perplexity"}),
    (OfRows, {"val_loss"}, {"val_perplexity"}),
    (Weighted, {"val_loss"}, {"val_perplexity"}),
    (Scheduled, {"val_loss"}, {"val_perplexity"}),
    (BaseOfTransformers, {"train_perplexity", "val_perplexity"}, set()),
    (Groups, {"train_perplexity", "val_perplexity"}, set()),
    (OwnFigures, {"norm_of_b", "epochs_done", "val_loss"}, set()),
    (OwnValidation, {"val_mine", "train_loss"}, {"val_loss"}),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by its old name
@pytest.mark.parametrize(
    ("kind", "logged", "not_logged"), [*CLASSES, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_it_trains_all_it_has_and_how_a_batch_is_cut_changes_nothing(
    kind, logged, not_logged, tiny_base, rows_file, tmp_path, capsys
):
    losses = []
    for tokens in (8192, 1):  # all rows of a step in a micro-batch, or each in its own
        lightning.seed_everything(7, verbose=False)
        module = kind(str(tiny_base), **_SETTINGS, micro_batch_tokens=tokens)
        module.configure_model()
        before = {name: each.detach().clone() for name, each in module.named_parameters() if each.requires_grad}
        trainer = fit(module, tmp_path, rows_file, val=True, batch_size=8, max_epochs=1)
        after = dict(module.named_parameters())
        assert not [name for name, each in before.items() if torch.equal(each, after[name])]
        assert logged <= trainer.callback_metrics.keys()
        assert not not_logged & trainer.callback_metrics.keys()
        losses.append(float(trainer.callback_metrics["train_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    said = capsys.readouterr().out
    assert "returns no sums" not in said
    assert ("returns the base alone" in said) == (kind is OwnLoRA)
    module.save_adapter(tmp_path / "adapter")
    assert same(kind.from_run(tmp_path / "adapter").state_dict(), module.state_dict())


def test_a_base_that_only_its_class_makes_is_opened_by_that_class(tiny_base, tmp_path):
    module = BaseOfTransformers(str(tiny_base), **_SETTINGS)
    module.configure_model()
    module.save_adapter(tmp_path / "adapter")
    with rejects("adapter.base", "from_run of that class"):
        QLoRAModule.from_run(tmp_path / "adapter")
