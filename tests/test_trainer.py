import lightning
import pytest

from qlora_lightning.support.trainer import callbacks_of, is_trial_run, log_interval


@pytest.mark.parametrize("trial", [False, 2])
def test_what_a_trainer_was_made_with_is_read_from_it(tmp_path, trial):
    mine = lightning.Callback()
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    made = lightning.Trainer(
        callbacks=[mine], fast_dev_run=trial, log_every_n_steps=7, default_root_dir=tmp_path, **options
    )
    assert mine in callbacks_of(made)
    assert is_trial_run(made) is bool(trial)
    assert log_interval(made) == 7
