import json
import shutil

import lightning
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from qlora_lightning import AdapterCheckpoint, Evaluation, QLoRAModule
from qlora_lightning.support.errors import UserError


class Scored(QLoRAModule):
    """Logs a given score at each validation instead of one that happens to come out."""

    scores = ()

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val_score", self.scores[0])
        self.scores = self.scores[1:]


class Diary(lightning.Callback):
    """What happened at which step: validations and saves."""

    def __init__(self):
        self.entries, self.losses = [], []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.entries.append(("validation", trainer.global_step))

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["val_loss"]))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.entries.append(("save", trainer.global_step))


@pytest.fixture
def scored(make_module):
    def make(*scores):
        module = make_module(Scored)
        module.scores = scores
        return module

    return make


def read_checkpoint(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def adapter_of_checkpoint(checkpoint):
    """The adapter's tensors under the names that PEFT gives them in a file."""
    return {
        name.removeprefix("model.").replace(".default.", "."): tensor
        for name, tensor in checkpoint["state_dict"].items()
    }


def adapter_of_folder(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def checkpoint_names(folder):
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def tensors_in(content):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors_in(value)


def test_a_fit_leaves_last_best_and_an_adapter_folder_for_plain_peft(fit, adapter_of, assert_same, tiny_base, tmp_path):
    _, module = fit(AdapterCheckpoint())
    run = tmp_path / "run"
    assert sorted(file.name for file in run.iterdir()) == ["adapter", "checkpoints"]
    assert checkpoint_names(run) == ["last.ckpt", "step-000008.ckpt"]
    assert sorted(file.name for file in (run / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "qlora_lightning.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tensors = adapter_of_folder(run)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert_same(tensors, adapter_of_checkpoint(read_checkpoint(run)))
    assert_same(read_checkpoint(run)["state_dict"], adapter_of(module))
    generation = json.loads((run / "adapter" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    identity = json.loads((run / "adapter" / "qlora_lightning.json").read_text())
    assert (identity["base"], identity["quantization"]) == (str(tiny_base), "nf4")
    config = peft.PeftConfig.from_pretrained(run / "adapter")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 4, str(tiny_base))


def test_the_stop_tokens_of_the_data_go_into_the_adapter_folder(fit, make_data, tmp_path):
    data = make_data(val=None)
    data.renderer.stop_ids |= {7}
    fit(AdapterCheckpoint(), data=data, limit_train_batches=1)
    generation = json.loads((tmp_path / "run" / "adapter" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7]


def test_last_is_small_and_contains_adapter_tensors_only(fit, make_module, adapter_of, tmp_path):
    _, module = fit(AdapterCheckpoint(), module=make_module(rank=64), limit_train_batches=2)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    adapter = adapter_of(module)
    adapter_bytes = sum(4 * tensor.numel() for tensor in adapter.values())
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["state_dict"].keys() == adapter.keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    assert last.stat().st_size < 4 * adapter_bytes + 1_000_000
    # A, B and two moments of each; what is left are generators and counters.
    assert sum(tensor.nbytes for tensor in tensors_in(checkpoint)) < 3 * adapter_bytes + 50_000
    assert "gradients" not in checkpoint["qlora_lightning"]["window"]


def test_inside_an_open_window_the_gradients_come_on_top(killed_fit, make_module, adapter_of, tmp_path):
    module = make_module(rank=64)
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3, "limit_val_batches": 1}
    killed_fit(AdapterCheckpoint(), after=4, module=module, **options)  # validation, and save, after the third of four
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    adapter_bytes = sum(4 * tensor.numel() for tensor in adapter_of(module).values())
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 1
    assert checkpoint["qlora_lightning"]["window"]["gradients"].keys() == checkpoint["state_dict"].keys()
    assert last.stat().st_size < 5 * adapter_bytes + 1_000_000


@pytest.mark.parametrize(
    ("mode", "save_top_k", "best_step", "kept"),
    [
        ("min", 1, 6, [6]),
        ("min", 2, 6, [2, 6]),
        ("max", 1, 4, [4]),
        ("max", 2, 4, [4, 8]),
        ("max", 0, 4, []),
    ],
)
def test_the_best_by_the_monitor_are_kept_and_the_rest_pruned(
    fit, scored, assert_same, tmp_path, mode, save_top_k, best_step, kept
):
    checkpoint = AdapterCheckpoint(monitor="val_score", mode=mode, save_top_k=save_top_k)
    saved = {}

    class Remember(lightning.Callback):
        def on_save_checkpoint(self, trainer, pl_module, content):
            saved[trainer.global_step] = {name: tensor.clone() for name, tensor in content["state_dict"].items()}

    fit(checkpoint, Remember(), module=scored(2.0, 4.0, 1.0, 3.0), val_check_interval=2, limit_val_batches=1)
    run = tmp_path / "run"
    assert list(saved) == [2, 4, 6, 8]
    assert checkpoint_names(run) == ["last.ckpt", *(f"step-{step:06d}.ckpt" for step in kept)]
    assert_same(adapter_of_folder(run), adapter_of_checkpoint({"state_dict": saved[best_step]}))
    assert_same(read_checkpoint(run)["state_dict"], saved[8])
    for step in kept:
        assert_same(read_checkpoint(run, f"step-{step:06d}.ckpt")["state_dict"], saved[step])


def test_a_better_adapter_replaces_the_weights_alone_so_that_a_reader_finds_the_folder_at_any_time(
    fit, scored, tmp_path
):
    class Looks(lightning.Callback):
        seen = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            folder = tmp_path / "run" / "adapter"
            if folder.exists():
                self.seen += ((folder.stat().st_ino, (folder / "adapter_model.safetensors").stat().st_ino),)

    looks = Looks()
    fit(AdapterCheckpoint(monitor="val_score"), looks, module=scored(4.0, 3.0, 2.0, 1.0), val_check_interval=2)
    folders, weights = zip(*looks.seen, strict=True)
    assert len(set(folders)) == 1
    assert len(set(weights)) == 3  # validations before the last batch


def test_a_score_of_nan_is_never_the_best(fit, scored, tmp_path):
    nan = float("nan")
    checkpoint = AdapterCheckpoint(monitor="val_score", save_top_k=2)
    fit(checkpoint, module=scored(nan, 4.0, nan, 5.0), val_check_interval=2, limit_val_batches=1)
    assert checkpoint.best == [(4.0, "step-000004.ckpt"), (5.0, "step-000008.ckpt")]
    assert checkpoint_names(tmp_path / "run") == ["last.ckpt", "step-000004.ckpt", "step-000008.ckpt"]


def test_without_validation_data_the_adapter_is_the_last(fit, make_data, adapter_of, assert_same, tmp_path):
    _, module = fit(AdapterCheckpoint(every_n_train_steps=3), diary := Diary(), data=make_data(val=None))
    assert diary.entries == [("save", 3), ("save", 6), ("save", 8)]
    assert checkpoint_names(tmp_path / "run") == ["last.ckpt"]
    assert_same(adapter_of_folder(tmp_path / "run"), adapter_of_checkpoint({"state_dict": adapter_of(module)}))


@pytest.mark.parametrize(
    ("every_n_train_steps", "options", "expected"),
    [
        (2, {"val_check_interval": 4}, "save 2, validation 4, save 4, save 6, validation 8, save 8"),
        (2, {"val_check_interval": 0.5}, "save 2, validation 4, save 4, save 6, validation 8, save 8"),
        (8, {"check_val_every_n_epoch": 2, "max_epochs": 2}, "save 8, validation 16, save 16"),
        (4, {"max_epochs": 2}, "save 4, validation 8, save 8, save 12, validation 16, save 16"),
        (4, {"limit_val_batches": 0}, "save 4, save 8"),
        (
            3,
            {"check_val_every_n_epoch": None, "val_check_interval": 6, "max_epochs": 2},
            "save 3, validation 6, save 6, save 9, validation 12, save 12, save 15, save 16",
        ),
        (1, {"accumulate_grad_batches": 4}, "save 1, validation 2, save 2"),
        (2, {"max_steps": 3, "max_epochs": -1}, "save 2, save 3"),
        (None, {"val_check_interval": 4}, "validation 4, save 4, validation 8, save 8"),
        (None, {"val_check_interval": 6}, "validation 6, save 6, save 8"),
    ],
)
def test_it_saves_every_n_steps_but_never_before_a_validation_that_is_due(fit, every_n_train_steps, options, expected):
    options = {"limit_val_batches": 1} | options
    fit(AdapterCheckpoint(every_n_train_steps=every_n_train_steps), diary := Diary(), **options)
    assert ", ".join(f"{what} {step}" for what, step in diary.entries) == expected


@pytest.mark.parametrize(
    ("every_minutes", "options", "expected"),
    [
        (1e-6, {}, "save 1, save 2, save 3, validation 4, save 4"),  # at each step, and not inside its window
        (1e-6, {"val_check_interval": 3}, "save 1, validation 1, save 1, save 2, validation 3, save 3, save 4"),
        (10, {}, "validation 4, save 4"),  # not yet over
        (None, {}, "validation 4, save 4"),
    ],
)
def test_it_saves_at_the_end_of_the_step_in_which_so_many_minutes_are_over(fit, every_minutes, options, expected):
    options = {"limit_val_batches": 1, "accumulate_grad_batches": 2} | options
    fit(AdapterCheckpoint(every_minutes=every_minutes), diary := Diary(), **options)
    assert ", ".join(f"{what} {step}" for what, step in diary.entries) == expected


def test_the_minutes_are_counted_from_the_last_save(fit, monkeypatch):
    """A step takes four minutes by this clock, and a validation nothing."""
    callback, diary = AdapterCheckpoint(), Diary()

    class Clock(lightning.Callback):
        now = 100.0

        def on_train_batch_start(self, *_):
            self.now += 240

    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    clock = Clock()
    fit(clock, callback, diary, val_check_interval=4, limit_val_batches=1)
    assert diary.entries == [("save", 3), ("validation", 4), ("save", 4), ("save", 7), ("validation", 8), ("save", 8)]


@pytest.mark.parametrize("save_top_k", [1, 0])
def test_an_interrupted_save_leaves_the_earlier_files_readable(fit, monkeypatch, assert_same, tmp_path, save_top_k):
    run, save = tmp_path / "run", lightning.Trainer.save_checkpoint

    def fail_at_8(trainer, filepath, *args, **kwargs):
        save(trainer, filepath, *args, **kwargs)
        if trainer.global_step == 8:
            filepath.write_bytes(filepath.read_bytes()[:1000])
            raise OSError("disk full")

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", fail_at_8)
    told = rf"unfinished.ckpt could not be written: disk full\. {run}/checkpoints/last.ckpt is whole.*--ckpt_path last`"
    with pytest.raises(UserError, match=told):
        fit(AdapterCheckpoint(every_n_train_steps=4, save_top_k=save_top_k))
    assert checkpoint_names(run) == ["last.ckpt"]
    assert read_checkpoint(run)["global_step"] == 4
    assert_same(adapter_of_folder(run), adapter_of_checkpoint(read_checkpoint(run)))
    monkeypatch.undo()
    fit(AdapterCheckpoint(save_top_k=save_top_k), ckpt_path=run / "checkpoints" / "last.ckpt")
    assert read_checkpoint(run)["global_step"] == 8
    assert checkpoint_names(run) == ["last.ckpt", *(["step-000008.ckpt"] if save_top_k else [])]


def test_a_monitor_that_is_never_logged_is_refused_with_those_that_are(fit):
    with pytest.raises(UserError, match=r"'val_los'.* it logs val_loss, val_perplexity, val_token_accuracy\."):
        fit(AdapterCheckpoint(monitor="val_los"))


def test_the_sanity_check_says_already_that_the_monitor_is_not_logged(fit, capsys):
    fit(AdapterCheckpoint(monitor="val_los"), num_sanity_val_steps=1, max_steps=1, limit_val_batches=0.5)
    told = (
        "'val_los', which the sanity check did not log (it logged val_loss, val_perplexity, val_token_accuracy): unless"
    )
    assert told in capsys.readouterr().out
    fit(AdapterCheckpoint(), num_sanity_val_steps=1, max_steps=1, limit_val_batches=0.5, folder="right")
    assert "sanity" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("monitor", "evaluation", "told"),
    [
        ("val_exact_match", {"every_n_validations": 2}, False),
        ("val_stop_rate", {"every_n_validations": 2}, False),
        ("val_exact_mach", {"every_n_validations": 2}, True),
        ("exact_match", {"every_n_validations": 2}, True),
        ("val_exact_match", {"every_n_validations": 2, "enabled": False}, True),
        ("val_exact_match", {}, True),
    ],
)
def test_a_score_that_validations_log_later_is_no_unknown_monitor(fit, capsys, monitor, evaluation, told):
    callbacks = [AdapterCheckpoint(monitor=monitor), Evaluation(rows=2, **evaluation)]
    fit(*callbacks, num_sanity_val_steps=1, max_steps=1, limit_val_batches=0.5)
    assert ("which the sanity check did not log" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    "options", [{"every_n_train_steps": 0}, {"every_minutes": 0}, {"every_minutes": -0.5}, {"save_top_k": -1}]
)
def test_numbers_that_make_no_sense_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=rf"adapter_checkpoint\.{name} is {value}"):
        AdapterCheckpoint(**options)


def test_switched_off_it_writes_nothing(fit, tmp_path):
    fit(AdapterCheckpoint(enabled=False, every_n_train_steps=1, monitor="none"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_trial_run_does_not_touch_the_files_of_a_real_one(fit, tmp_path):
    fit(AdapterCheckpoint())
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    fit(AdapterCheckpoint(), fast_dev_run=True)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_resumed_run_goes_on_ranking(fit, scored, tmp_path):
    options = {"monitor": "val_score", "save_top_k": 1}
    fit(AdapterCheckpoint(**options), module=scored(1.0), limit_val_batches=1)
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    resumed = AdapterCheckpoint(**options)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(resumed, module=scored(2.0), max_epochs=2, ckpt_path=last, limit_val_batches=1)
    assert resumed.best == [(1.0, "step-000008.ckpt")]
    best = resumed.read_best(tmp_path / "run")
    kept = read_checkpoint(tmp_path / "run", "step-000008.ckpt")["state_dict"]
    assert best.keys() == kept.keys()
    assert all(torch.equal(best[name], kept[name]) for name in kept)
    assert resumed.read_best(tmp_path / "elsewhere") is None
    assert checkpoint_names(tmp_path / "run") == ["last.ckpt", "step-000008.ckpt"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_save_that_fails_at_the_adapter_folder_leaves_the_last_checkpoint_as_it_was(
    fit, scored, assert_same, monkeypatch, tmp_path
):
    run = tmp_path / "run"
    fit(AdapterCheckpoint(monitor="val_score"), module=scored(2.0), limit_val_batches=1)
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()

    def fail(module, folder, tokenizer, stop_ids):
        raise OSError("disk full")

    monkeypatch.setattr(QLoRAModule, "save_adapter", fail)
    again = {"max_epochs": 2, "ckpt_path": last, "limit_val_batches": 1}
    with pytest.raises(UserError, match=rf"{run}/adapter could not be written: disk full. \S+/step-\d+.ckpt is whole"):
        fit(AdapterCheckpoint(monitor="val_score"), module=scored(1.0), **again)
    monkeypatch.undo()
    assert last.read_bytes() == before
    fit(AdapterCheckpoint(monitor="val_score"), module=scored(1.0), **again)  # goes on from there
    assert_same(adapter_of_folder(run), adapter_of_checkpoint(read_checkpoint(run, "step-000016.ckpt")))


STEPS = "every_n_train_steps"


@pytest.mark.parametrize(
    ("after", "saved_step", "options", "every"),
    [
        (13, 6, {}, STEPS),  # inside the second epoch, inside a window, after a step's checkpoint
        (8, 3, {}, STEPS),  # the last step of the first epoch is not saved yet: its validation was due
        (12, 5, {"val_check_interval": 3}, STEPS),  # a validation inside a window, whose gradients go on
        (13, 6, {}, "every_minutes"),
        pytest.param(9, 4, {}, STEPS, marks=pytest.mark.slow),  # after the validation at an epoch's end
        pytest.param(8, 3, {"val_check_interval": 7, "check_val_every_n_epoch": None}, STEPS, marks=pytest.mark.slow),
        pytest.param(11, 5, {"check_val_every_n_epoch": 2}, STEPS, marks=pytest.mark.slow),
        pytest.param(8, 3, {}, "every_minutes", marks=pytest.mark.slow),
        pytest.param(12, 5, {"val_check_interval": 3}, "every_minutes", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumed_ends_bit_for_bit_as_one_that_never_stopped(
    fit, killed_fit, make_module, adapter_of, assert_same, tmp_path, after, saved_step, options, every
):
    def setup(folder):
        return {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 1, "folder": folder} | options

    whole, before, resumed = Diary(), Diary(), Diary()
    every_step = {every: 1e-6 if every == "every_minutes" else 1}
    _, expected = fit(AdapterCheckpoint(**every_step), whole, module=make_module(dropout=0.1), **setup("whole"))
    killed_fit(AdapterCheckpoint(**every_step), before, module=make_module(dropout=0.1), after=after, **setup("cut"))
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == saved_step
    module = make_module(dropout=0.1)
    fit(AdapterCheckpoint(**every_step), resumed, module=module, seed=99, ckpt_path=last, **setup("cut"))
    assert_same(adapter_of(module), adapter_of(expected))
    assert before.entries + resumed.entries == whole.entries
    assert before.losses + resumed.losses == whole.losses
    for name in ("optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(
            read_checkpoint(tmp_path / "cut")[name], read_checkpoint(tmp_path / "whole")[name], rtol=0, atol=0
        )


def test_a_finished_run_goes_on_to_more_epochs_as_if_it_had_never_stopped(
    fit, make_module, adapter_of, assert_same, tmp_path
):
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 1}
    _, expected = fit(AdapterCheckpoint(), module=make_module(dropout=0.1), folder="whole", max_epochs=2, **options)
    fit(AdapterCheckpoint(), module=make_module(dropout=0.1), folder="cut", max_epochs=1, **options)
    module = make_module(dropout=0.1)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    fit(AdapterCheckpoint(), module=module, folder="cut", max_epochs=2, ckpt_path=last, seed=99, **options)
    assert_same(adapter_of(module), adapter_of(expected))
    assert_same(adapter_of_folder(tmp_path / "cut"), adapter_of_folder(tmp_path / "whole"))


SHORT = {"limit_train_batches": 2, "limit_val_batches": 1}


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_is_never_written_over_by_another(fit, tmp_path):
    checkpoint = AdapterCheckpoint()
    trainer, module = fit(checkpoint, **SHORT)
    fit(AdapterCheckpoint(), folder="other", **SHORT)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"run holds a run already.*ckpt_path=.*run/checkpoints/last\.ckpt"):
        fit(AdapterCheckpoint(), **SHORT)
    other = tmp_path / "other" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=rf"run holds a run already, which would be lost. {other} is not of it"):
        fit(AdapterCheckpoint(), ckpt_path=other, max_epochs=2, **SHORT)
    assert contents(tmp_path / "run") == before
    fit(AdapterCheckpoint(enabled=False), **SHORT)
    assert contents(tmp_path / "run") == before
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=trainer.datamodule)  # the Trainer that made it may go on
    assert read_checkpoint(tmp_path / "run")["global_step"] == 4


def test_a_run_that_goes_on_in_another_folder_ranks_anew_and_says_where_the_best_lies(fit, scored, tmp_path, capsys):
    options = {"monitor": "val_score", "save_top_k": 2}
    fit(AdapterCheckpoint(**options), module=scored(1.0), **SHORT)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    moved = AdapterCheckpoint(**options)
    fit(moved, module=scored(2.0), folder="new", ckpt_path=last, max_epochs=2, **SHORT)
    best = last.with_name("step-000002.ckpt")
    assert f"starts over here. The best so far, with val_score 1, is {best}.\n" in capsys.readouterr().out
    assert moved.best == [(2.0, "step-000004.ckpt")]
    assert checkpoint_names(tmp_path / "new") == ["last.ckpt", "step-000004.ckpt"]
    assert adapter_of_folder(tmp_path / "new")
    assert checkpoint_names(tmp_path / "run") == ["last.ckpt", "step-000002.ckpt"]


def test_the_same_callback_in_another_run_begins_anew(fit, scored, tmp_path):
    checkpoint = AdapterCheckpoint(monitor="val_score")
    fit(checkpoint, module=scored(1.0), **SHORT)
    fit(checkpoint, module=scored(2.0), folder="new", **SHORT)
    assert checkpoint.best == [(2.0, "step-000002.ckpt")]
    assert adapter_of_folder(tmp_path / "new")


def test_no_second_fit_runs_in_a_folder_at_once(fit, tmp_path):
    class Second(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with pytest.raises(UserError, match=r"A run is going on in .*/run: wait until it has ended"):
                AdapterCheckpoint().setup(trainer, pl_module, "fit")

    fit(AdapterCheckpoint(), Second(), **SHORT)
    fit(AdapterCheckpoint(), ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt", max_epochs=2, **SHORT)


def test_a_state_that_could_not_be_read_again_ends_the_run_and_the_last_checkpoint_stays(fit, tmp_path):
    class Odd(lightning.Callback):
        value = 1.0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.value = np.float64(1) if trainer.global_step == 3 else 1.0

        def state_dict(self):
            return {"value": self.value, "fine": 1}

    told = (
        r"Odd'\]\['value'\] is a numpy\.float64; expected .*last.ckpt is whole: resume from it by "
        r"`--ckpt_path last` when every state_dict holds nothing else\.$"
    )
    with pytest.raises(UserError, match=told):
        fit(AdapterCheckpoint(every_n_train_steps=2), Odd())
    assert checkpoint_names(tmp_path / "run") == ["last.ckpt"]
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2


def test_a_checkpoint_that_lacks_a_part_is_refused_before_anything_is_restored(fit, tmp_path):
    fit(AdapterCheckpoint(), **SHORT)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["loops"]  # without them Lightning would count from zero again, and say nothing
    torch.save(checkpoint, last)
    with pytest.raises(UserError, match="The checkpoint lacks loops"):
        fit(AdapterCheckpoint(), ckpt_path=last, max_epochs=2, **SHORT)


@pytest.mark.parametrize(
    "seconds", [(8, 14), pytest.param(sorted({*range(1, 17)} - {8, 14}), marks=pytest.mark.slow)], ids=str
)
def test_a_run_killed_at_an_epochs_end_and_again_in_the_next_epoch_ends_the_same(
    fit, killed_fit, make_module, make_data, adapter_of, assert_same, tmp_path, seconds
):
    """Lightning does not count the epoch after such a resume, and would lose its rest at the next one."""
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"

    def parts():
        module, data = make_module(dropout=0.1, schedule="cosine"), make_data(batch_size=1)  # 16 batches an epoch
        return {"module": module, "data": data, "max_epochs": 2, "accumulate_grad_batches": 4, "val_check_interval": 6}

    def checkpoint():
        return AdapterCheckpoint(every_n_train_steps=1)

    _, whole = fit(checkpoint(), folder="whole", limit_val_batches=1, **parts())
    options = {"folder": "killed", "limit_val_batches": 1}
    killed_fit(checkpoint(), after=17, **options, **parts())
    shutil.copytree(tmp_path / "killed", tmp_path / "killed once")
    for second in seconds:
        shutil.rmtree(tmp_path / "killed")
        shutil.copytree(tmp_path / "killed once", tmp_path / "killed")
        killed_fit(checkpoint(), after=second, ckpt_path=last, **options, **parts())
        trainer, module = fit(checkpoint(), ckpt_path=last, **options, **parts())
        assert trainer.global_step == 8, second
        assert_same(adapter_of(module), adapter_of(whole))
