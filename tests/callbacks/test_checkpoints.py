import json

import lightning
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from qlora_lightning import AdapterCheckpoint, LoadingLines
from qlora_lightning.support.errors import UserError


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
        ("min", 2, 6, [2, 6]),
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
        (8, {"check_val_every_n_epoch": 2, "max_epochs": 2}, "save 8, validation 16, save 16"),
        (
            3,
            {"check_val_every_n_epoch": None, "val_check_interval": 6, "max_epochs": 2},
            "save 3, validation 6, save 6, save 9, validation 12, save 12, save 15, save 16",
        ),
        (1, {"accumulate_grad_batches": 4}, "save 1, validation 2, save 2"),
        (2, {"max_steps": 3, "max_epochs": -1}, "save 2, save 3"),
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
        (None, {}, "validation 4, save 4"),
    ],
)
def test_it_saves_at_the_end_of_the_step_in_which_so_many_minutes_are_over(fit, every_minutes, options, expected):
    options = {"limit_val_batches": 1, "accumulate_grad_batches": 2} | options
    fit(AdapterCheckpoint(every_minutes=every_minutes), diary := Diary(), **options)
    assert ", ".join(f"{what} {step}" for what, step in diary.entries) == expected


def test_a_monitor_that_is_never_logged_is_refused_with_those_that_are(fit):
    with pytest.raises(UserError, match=r"'val_los'.* it logs val_loss, val_perplexity, val_token_accuracy\."):
        fit(AdapterCheckpoint(monitor="val_los"))


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


STEPS = "every_n_train_steps"


@pytest.mark.parametrize(
    ("after", "saved_step", "options", "every"),
    [
        (13, 6, {}, STEPS),  # inside the second epoch, inside a window, after a step's checkpoint
        (8, 3, {}, STEPS),  # the last step of the first epoch is not saved yet: its validation was due
        (12, 5, {"val_check_interval": 3}, STEPS),  # a validation inside a window, whose gradients go on
        (13, 6, {}, "every_minutes"),
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


def test_a_state_that_could_not_be_read_again_ends_the_run_and_the_last_checkpoint_stays(fit, tmp_path):
    class Odd(lightning.Callback):
        value = 1.0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.value = np.float64(1) if trainer.global_step == 3 else 1.0

        def state_dict(self):
            return {"value": self.value, "fine": 1}

    told = r"would not be read again: it holds a numpy.*last.ckpt is whole: .*`--ckpt_path last`"
    with pytest.raises(UserError, match=told):
        fit(AdapterCheckpoint(every_n_train_steps=2), Odd())
    assert checkpoint_names(tmp_path / "run") == ["last.ckpt"]
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2


# PEFT 0.21 asks transformers 5.24 for an attribute by its old name: whoever runs the three lines sees it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_three_printed_lines_load_the_adapter_with_plain_peft(fit, capsys):
    _, module = fit(LoadingLines(), AdapterCheckpoint(), limit_train_batches=2)
    text = capsys.readouterr().out
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
