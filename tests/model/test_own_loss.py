"""An own ``compute_loss`` trains what it says, and is stopped, or warned of, where it would train something else."""

import math

import lightning
import pytest
import torch

from qlora_lightning import LossSums, QLoRAModule
from tests.errors import rejects
from tests.steps import distance, fit, make_batch, make_module

_STEADY = {"rank": 2, "compute_dtype": "fp32", "learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}


@pytest.fixture
def train(tiny_base, rows_file, tmp_path):
    """Train on sixteen rows, four a step, by a loss of the module and a batch, if any; give metrics and adapter."""

    def run(loss=None, **options):
        lightning.seed_everything(7, verbose=False)
        kind = QLoRAModule if loss is None else type("Own", (QLoRAModule,), {"compute_loss": loss})
        module = kind(str(tiny_base), **_STEADY)
        trainer = fit(module, tmp_path, rows_file, **{"batch_size": 4, "max_epochs": 1} | options)
        return trainer.callback_metrics, torch.cat([tensor.flatten() for tensor in module.state_dict().values()])

    return run


def nll_of(module, batch):
    return module.token_losses(batch)[0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda module, batch: LossSums.of(nll_of(module, batch)),
        lambda module, batch: LossSums((nll := nll_of(module, batch)).sum(), len(nll)),  # a plain int
        lambda module, batch: LossSums(1e-3 * (nll := nll_of(module, batch)).sum(), 1e-3 * len(nll)),
    ],
    ids=["of", "int", "weights"],
)
def test_a_sum_is_divided_by_what_was_counted_whatever_that_is(train, loss):
    (metrics, adapter), (expected_metrics, expected) = train(loss), train()
    assert distance(adapter, expected) < 1e-4
    assert float(metrics["train_loss"]) == pytest.approx(float(expected_metrics["train_loss"]), rel=1e-5)


def test_a_plain_count_is_made_on_the_device_of_the_loss():
    sums = LossSums(torch.zeros((), device="meta"), 3, {"rows": 2})
    assert {each.device.type for each in sums.by_name().values()} == {"meta"}


@pytest.mark.parametrize(
    ("key", "fact", "loss"),
    [
        ("loss.type", "returned Tensor", lambda module, batch: nll_of(module, batch).mean()),
        ("loss.shape", "LossSums.loss_sum", lambda module, batch: LossSums(nll_of(module, batch), 1)),
        ("loss.shape", "losses", lambda module, batch: LossSums.of(nll_of(module, batch)[:, None])),
        ("loss.shape", "weight", lambda module, batch: LossSums.of((nll := nll_of(module, batch)), weight=nll[1:])),
        ("loss.count", "nan", lambda module, batch: LossSums(nll_of(module, batch).sum(), math.nan)),
        ("loss.gradient", "no gradient", lambda module, batch: LossSums.of(nll_of(module, batch).detach())),
        ("loss.shape", "LossSums.metrics.nll", lambda module, batch: LossSums(0, 1, {"nll": nll_of(module, batch)})),
        ("loss.log", "entropy", lambda module, batch: module.log("entropy", 1.0)),
        ("loss.count", "inf", lambda module, batch: LossSums(nll_of(module, batch).sum(), math.inf)),
        ("loss.count", "-3", lambda module, batch: LossSums(nll_of(module, batch).sum(), -3)),
        # as with labels that a template or a collate function has masked, all of them
        ("loss.nothing_counted", "no token", lambda module, batch: LossSums(nll_of(module, batch).sum(), 0)),
    ],
)
def test_what_is_no_sum_of_tokens_is_rejected(train, key, fact, loss):
    with rejects(key, fact):
        train(loss)


def test_one_step_that_counts_nothing_has_no_gradient(train):
    metrics, _ = train(lambda module, batch: LossSums(nll_of(module, batch).sum(), 0), max_steps=1)
    assert float(metrics["train_loss"]) == float(metrics["grad_norm"]) == 0


def training_only(module, batch):
    assert module.training
    return LossSums.of(nll_of(module, batch))


def needs_gradients(module, batch):
    nll = nll_of(module, batch)
    weight = next(p for p in module.parameters() if p.requires_grad)
    torch.autograd.grad(nll.sum(), weight, retain_graph=True)
    return LossSums.of(nll)


def mean_with_gradients(module, batch):
    sums = needs_gradients(module, batch)
    return LossSums(sums.loss_sum / sums.count, sums.count)


def draws(module, batch):
    nll = nll_of(module, batch)
    return LossSums.of(nll * torch.rand_like(nll))


def draws_signs(module, batch):
    rows = nll_of(module, batch).split(batch.counts)
    signs = torch.tensor([1.0, -1.0, *torch.randint(2, (len(rows),)) * 2.0 - 1])
    return LossSums.of(torch.stack([sign * row.sum() for sign, row in zip(signs, rows, strict=False)]))


def sum_and_mean(module, batch):
    nll = nll_of(module, batch)
    return LossSums(nll.sum(), len(nll), {"entropy": nll.mean()})


def l2(module):
    return sum(each.square().sum() for each in module.parameters() if each.requires_grad)


@pytest.mark.parametrize(
    ("fault", "loss"),
    [
        ("", lambda module, batch: LossSums.of(2 * nll_of(module, batch))),
        ("", training_only),
        ("", needs_gradients),
        ("", draws),
        ("", draws_signs),
        ("loss_sum", lambda module, batch: LossSums((nll := nll_of(module, batch)).mean(), len(nll))),
        ("count", lambda module, batch: LossSums(nll_of(module, batch).mean(), 1)),
        ("loss_sum", lambda module, batch: LossSums(torch.rand(()) * (nll := nll_of(module, batch)).mean(), len(nll))),
        ("loss_sum", mean_with_gradients),
        ("loss_sum", lambda module, batch: LossSums((nll := nll_of(module, batch)).sum() + 1.0, len(nll))),
        ("loss_sum", lambda module, batch: LossSums((nll := nll_of(module, batch)).sum() + l2(module), len(nll))),
        ("", lambda module, batch: LossSums.of(nll_of(module, batch) + l2(module))),
        ("metrics.entropy", sum_and_mean),
    ],
)
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_means_in_place_of_sums_are_reported_at_any_batch_size(train, capsys, fault, loss, batch_size):
    train(loss, max_steps=1, accumulate_grad_batches=4 // batch_size, batch_size=batch_size)
    said = capsys.readouterr().out
    assert ("compute_loss of Own returns no sums" in said) == bool(fault)
    assert fault in said


def test_a_loss_with_a_state_is_left_in_it_by_the_check(tiny_base, rows_file, tmp_path, capsys):
    class Counts(QLoRAModule):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.calls, self.counts, self.baseline = 0, [], torch.zeros(1)
            self.metric = torch.nn.BatchNorm1d(1, affine=False)
            self.register_buffer("seen", torch.zeros(()))

        def compute_loss(self, batch):
            self.calls += 1
            self.late_calls = getattr(self, "late_calls", 0) + 1  # an attribute that the first batch makes
            self.seen += 1
            self.counts.append(self.calls)
            self.baseline.add_(1)
            self.metric.num_batches_tracked.add_(1)
            return LossSums.of(nll_of(self, batch) / self.calls)

    module = Counts(str(tiny_base), **_STEADY)
    fit(module, tmp_path, rows_file, batch_size=4, max_steps=1)
    assert module.calls == float(module.seen) == float(module.baseline) == int(module.metric.num_batches_tracked) == 1
    assert module.counts == [module.late_calls] == [1]
    assert "returns no sums" not in capsys.readouterr().out


def test_sums_in_bf16_are_added_up_in_float64(train):
    def loss(module, batch):
        sums = LossSums.of(nll_of(module, batch))
        return LossSums(sums.loss_sum.bfloat16(), sums.count.bfloat16())

    metrics, _ = train(loss, max_steps=1)
    expected, _ = train(max_steps=1)
    assert float(metrics["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=1e-2)


def test_validation_rows_without_labels_are_named_and_no_divergence(tiny_base, rows_file, tmp_path):
    def loss(module, batch):
        nll = nll_of(module, batch)
        return LossSums.of(nll if module.training else nll[:0])

    module = type("Own", (QLoRAModule,), {"compute_loss": loss})(str(tiny_base), **_STEADY)
    with rejects("loss.nothing_counted", "val rows"):
        fit(module, tmp_path, rows_file, val=True, batch_size=8, max_epochs=1)


@pytest.mark.parametrize("factor", [1, 100])
def test_a_first_loss_far_from_that_of_the_validation_before_it_is_reported(train, capsys, factor):
    def loss(module, batch):
        return LossSums.of((factor if module.training else 1) * nll_of(module, batch))

    train(loss, max_steps=1, val=True, num_sanity_val_steps=1)
    assert ("the validation before it, of the same weights" in capsys.readouterr().out) == (factor > 1)


@pytest.mark.slow
def test_perplexity_is_of_the_tokens_likelihoods_or_not_logged(train):
    def smoothed(module, batch):
        sums = QLoRAModule.compute_loss(module, batch)
        return LossSums(3 * sums.loss_sum, sums.count, sums.metrics)

    options = {"val": True, "limit_train_batches": 1}
    (metrics, _), (usual, _) = train(smoothed, **options), train(**options)
    (own, _) = train(lambda module, batch: LossSums.of(nll_of(module, batch)), **options)
    for split in ("train", "val"):
        assert float(usual[f"{split}_perplexity"]) == pytest.approx(math.exp(float(usual[f"{split}_loss"])), rel=1e-4)
        assert metrics[f"{split}_loss"] > 2.9 * usual[f"{split}_loss"]
        assert f"{split}_perplexity" not in own
    assert metrics["train_perplexity"] == usual["train_perplexity"]


def test_a_teacher_has_no_noise_and_no_dropout_of_the_student(tiny_base):
    """Distillation from the base: its states in a training step are those of an evaluation."""
    module = make_module(tiny_base, neftune_alpha=5.0, dropout=0.5)
    with torch.no_grad():
        noisy = module.train().last_states(make_batch())[0]
        with module.model.disable_adapter():
            teacher = module.last_states(make_batch())[0]
            expected = module.eval().last_states(make_batch())[0]
    module.train()
    assert torch.equal(teacher, expected)
    assert not torch.equal(module.last_states(make_batch())[0].detach(), noisy)
    assert module.model.training
