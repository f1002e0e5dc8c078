import re

import pytest
import torch
from lightning import Callback

from qlora_lightning import AdapterCheckpoint, BaseComparison
from qlora_lightning.callbacks import base_comparison
from qlora_lightning.model.statistics import TokenStatistics


@pytest.fixture
def figures(capsys):
    """The printed table: two figures, base and adapter, by metric."""

    def read():
        text = capsys.readouterr().out
        rows = re.findall(r"│ (loss|perplexity|token accuracy) +│ +([\d.]+) │ +([\d.]+) │", text)
        return {name: (float(base), float(adapter)) for name, base, adapter in rows}, text

    return read


class Modes(Callback):
    """Takes down, before the comparison, what it must leave as it was."""

    def on_train_end(self, trainer, pl_module):
        self.adapter = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        pl_module.train()

    def on_fit_end(self, trainer, pl_module):
        self.training = {name: module.training for name, module in pl_module.named_modules()}


def judge(module, data):
    statistics = TokenStatistics()
    module.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            statistics.update(module.compute_loss(batch))
    return {name.replace("_", " "): float(value) for name, value in statistics.compute().items()}


def test_base_and_best_adapter_are_judged_and_the_last_one_stays(
    fit, make_module, make_data, adapter_of, assert_same, figures, tmp_path
):
    # A learning rate at which the loss rises again: the best adapter is not the last.
    options = {"val_check_interval": 1, "limit_train_batches": 3, "max_epochs": 1}
    data, checkpoint = make_data(), AdapterCheckpoint(mode="max")  # "best" is the worst: surely not the last
    _, module = fit(modes := Modes(), BaseComparison(samples=0), checkpoint, data=data, **options)
    printed, _ = figures()
    assert_same(adapter_of(module), modes.adapter)
    assert checkpoint.best[0][1] != "step-000003.ckpt"
    untouched = make_module()
    untouched.configure_model()
    for name, value in judge(untouched, data).items():
        assert printed[name][0] == pytest.approx(value, abs=6e-5, rel=1e-6)
    assert printed["loss"][1] == pytest.approx(checkpoint.best[0][0], abs=6e-5)
    assert printed["loss"][1] != pytest.approx(judge(module, data)["loss"], abs=6e-5)
    saved = checkpoint.read_best(tmp_path / "run")
    untouched.load_state_dict(saved)
    assert printed["loss"][1] == pytest.approx(judge(untouched, data)["loss"], abs=6e-5)


def test_modes_are_left_as_they_were(fit):
    _, module = fit(modes := Modes(), BaseComparison(samples=1, max_new_tokens=2), AdapterCheckpoint())
    assert {name: part.training for name, part in module.named_modules()} == modes.training
    assert module.model.training


def test_the_best_adapter_is_judged_where_no_checkpoint_of_it_is_kept(fit, figures):
    checkpoint = AdapterCheckpoint(mode="max", save_top_k=0)
    fit(BaseComparison(samples=0), checkpoint, val_check_interval=1, limit_train_batches=3)
    assert figures()[0]["loss"][1] == pytest.approx(checkpoint.best[0][0], abs=6e-5)


def test_answers_of_both_are_shown_beside_what_was_expected(fit, figures):
    fit(BaseComparison(samples=2, max_new_tokens=3), AdapterCheckpoint(), limit_train_batches=1)
    _, text = figures()
    assert re.findall(r"│ (\w+) +│", text[text.index("Validation rows") :]) == [
        "loss", "perplexity", *(["prompt", "expected", "base", "adapter"] * 2)
    ]  # fmt: skip
    assert re.search(r"prompt +│ Count to 1\. Please\. +│", text)
    assert re.search(r"expected +│ 1 2 ", text)


def test_the_model_is_restored_when_judging_fails(fit, monkeypatch, adapter_of, assert_same):
    monkeypatch.setattr(base_comparison, "_judge", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    modes = Modes()
    modules = []

    class Keep(Callback):
        def on_fit_start(self, trainer, pl_module):
            modules.append(pl_module)

    with pytest.raises(ZeroDivisionError):
        fit(modes, Keep(), BaseComparison(), AdapterCheckpoint(mode="max"), val_check_interval=1, limit_train_batches=3)
    assert_same(adapter_of(modules[0]), modes.adapter)


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"fast_dev_run": True}])
def test_without_validation_or_in_a_trial_run_nothing_is_compared(fit, figures, options):
    fit(BaseComparison(), limit_train_batches=1, **options)
    assert figures()[0] == {}


# PEFT 0.21 asks transformers 5.24 for an attribute by its old name: whoever runs the three lines sees it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_three_printed_lines_load_the_adapter_with_plain_peft(fit, figures, tmp_path):
    _, module = fit(BaseComparison(samples=0), AdapterCheckpoint(), limit_train_batches=2)
    _, text = figures()
    lines = text[text.index("from peft") :].strip().splitlines()
    assert len(lines) == 3
    loaded = {}
    exec("\n".join(lines), loaded)
    ids = torch.tensor([loaded["tokenizer"]("Count to 3.")["input_ids"]])
    with torch.no_grad():
        module.eval()
        ours = module.model(input_ids=ids).logits.float()
        theirs = loaded["model"](input_ids=ids).logits.float()
        with module.model.disable_adapter():
            base = module.model(input_ids=ids).logits.float()
    assert (ours - theirs).norm() < 0.05 * (ours - base).norm()
