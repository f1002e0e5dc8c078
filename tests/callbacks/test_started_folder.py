from types import SimpleNamespace

import pytest

from qlora_lightning.callbacks.started_folder import goes_on, refuse_everywhere, refuse_started_folder
from qlora_lightning.support.errors import UserError


@pytest.mark.parametrize(
    ("trace", "table", "refused"),
    [
        ("metrics.csv", True, True),
        ("metrics.csv", False, False),
        ("checkpoints/last.ckpt", True, True),
        ("checkpoints/step-000004.ckpt", False, True),
        ("checkpoints/unfinished.ckpt", False, False),  # of a kill during the very first save
    ],
)
def test_a_folder_that_holds_a_run_is_refused_with_the_two_ways_out(tmp_path, trace, table, refused):
    run = tmp_path / "run"
    refuse_started_folder(run, table=table)
    (run / trace).parent.mkdir(parents=True)
    refuse_started_folder(run, table=table)
    (run / trace).touch()
    if not refused:
        refuse_started_folder(run, table=table)
        return
    with pytest.raises(UserError, match=r"run holds a run already.*`--ckpt_path last`.*`--trainer.default_root_dir "):
        refuse_started_folder(run, table=table)


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("runs/a/checkpoints/last.ckpt", True),
        ("runs/a/../a/checkpoints/step-000004.ckpt", True),
        ("runs/a/hpc_ckpt_1.ckpt", True),
        ("runs/a/mine/epoch.ckpt", True),
        ("runs/b/checkpoints/last.ckpt", False),
        ("runs/a/b/checkpoints/last.ckpt", False),  # of a run in a folder of its own inside
        ("last.ckpt", False),
    ],
)
def test_it_goes_on_from_a_checkpoint_of_its_own_and_no_other(tmp_path, monkeypatch, file, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt").touch()
    trainer = SimpleNamespace(ckpt_path=file, default_root_dir=str(tmp_path / "runs" / "a"), global_step=0)
    assert goes_on(trainer) == own
    if own:
        refuse_started_folder("runs/a", file)
        return
    with pytest.raises(UserError, match=f"runs/a holds a run already, which would be lost. {file} is not of it. Go on"):
        refuse_started_folder("runs/a", file)


def test_without_a_checkpoint_only_the_trainer_that_has_trained_goes_on(tmp_path):
    trainer = SimpleNamespace(ckpt_path=None, default_root_dir=tmp_path, global_step=0)
    assert not goes_on(trainer)
    trainer.global_step = 3
    assert goes_on(trainer)


@pytest.mark.parametrize(("fault", "sent"), [("no", "no"), (None, None)])
def test_what_the_first_process_refuses_ends_all(fault, sent):
    heard = []
    strategy = SimpleNamespace(broadcast=lambda message: heard.append(message) or message)

    def check():
        if fault:
            raise UserError(fault)

    first = SimpleNamespace(is_global_zero=True, strategy=strategy)
    second = SimpleNamespace(is_global_zero=False, strategy=SimpleNamespace(broadcast=lambda _: heard[0]))
    for trainer in (first, second):
        if fault:
            with pytest.raises(UserError, match=r"^no$"):
                refuse_everywhere(trainer, check)
        else:
            refuse_everywhere(trainer, check)
    assert heard == [sent]
