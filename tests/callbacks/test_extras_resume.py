"""Runs with NEFTune and LoRA+ go on exactly, and say what changed."""

import pytest
import torch

from qlora_lightning import AdapterCheckpoint
from qlora_lightning.support.errors import UserError


@pytest.mark.parametrize("after", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_with_noise_resumes_exactly(after, fit, killed_fit, make_module, tmp_path, adapter_of, assert_same):
    def noisy():
        return make_module(neftune_alpha=5.0)

    options = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    _, peace = fit(AdapterCheckpoint(every_n_train_steps=1), module=noisy(), folder="peace", **options)
    killed_fit(AdapterCheckpoint(every_n_train_steps=1), after=after, module=noisy(), **options)
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    _, ended = fit(AdapterCheckpoint(every_n_train_steps=1), module=noisy(), ckpt_path=last, **options)
    assert_same(adapter_of(ended), adapter_of(peace))
    _, plain = fit(folder="plain", **options)
    assert any(not torch.equal(a, b) for a, b in zip(*(adapter_of(m).values() for m in (plain, peace)), strict=True))


def test_the_schedule_scales_both_rates_and_a_run_resumes_exactly(
    fit, killed_fit, make_module, tmp_path, adapter_of, assert_same
):
    def plus():
        return make_module(loraplus_ratio=4.0, learning_rate=1e-3, schedule="linear")

    trainer, peace = fit(AdapterCheckpoint(), module=plus(), folder="peace", max_steps=4)
    assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == [1e-3, 4e-3]
    killed_fit(AdapterCheckpoint(every_n_train_steps=1), after=3, module=plus(), max_steps=4)
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    _, ended = fit(AdapterCheckpoint(), module=plus(), ckpt_path=last, max_steps=4)
    assert_same(adapter_of(ended), adapter_of(peace))


def test_on_a_resume_a_new_ratio_rules_and_a_switch_is_refused(fit, make_module, tmp_path, capsys):
    fit(AdapterCheckpoint(), module=make_module(loraplus_ratio=4.0, learning_rate=1e-3), max_steps=2)
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    other = make_module(loraplus_ratio=8.0, learning_rate=1e-3)
    trainer, _ = fit(AdapterCheckpoint(), module=other, ckpt_path=last, max_steps=4)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-3, 8e-3]
    assert "model.loraplus_ratio: 4.0 → 8.0" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"held 14 \+ 14 tensors in the checkpoint and hold 28: model\.loraplus_ratio"):
        fit(AdapterCheckpoint(), module=make_module(), ckpt_path=last, max_steps=6)
