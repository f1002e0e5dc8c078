"""What is refused, what is reported, and what each process gets back when a run resumes."""

import contextlib
import json
import random

import lightning
import numpy as np
import pytest
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.model.checkpoint.format import KEY
from qlora_lightning.model.checkpoint.ranks import capture_generators, restore_generators, share_states
from qlora_lightning.model.checkpoint.resume import check_save_point
from qlora_lightning.support.errors import UserError

# ---- what each process has of its own --------------------------------------------------------------------------------


def draw():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


def test_every_generator_continues_where_it_was_captured_also_from_a_file(tmp_path):
    draw()  # gauss and randn draw pairs: half of one is kept, and must be restored too
    torch.save(capture_generators(), tmp_path / "state")
    expected = draw()
    draw()
    restore_generators(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


@pytest.mark.gpu
def test_the_generator_of_the_gpu_continues_too():
    torch.zeros(1, device="cuda")  # a process that computes on no card has no generator of one
    state = capture_generators()
    expected = torch.randn(3, device="cuda")
    restore_generators(state)
    assert torch.equal(torch.randn(3, device="cuda"), expected)


def state(seed, gradient, tokens, row_ids):
    window = {
        "micro_batches": 2,
        "nll_sum": torch.tensor(float(tokens)),
        "labelled_tokens": torch.tensor(tokens),
        "row_ids": row_ids,
        "gradients": {"a": torch.tensor(gradient)},
    }
    return {"generators": {"seed": seed}, "window": window}


SAVED = [state(7, [2.0, 1.0], 10, [7]), state(8, [3.0, 1.0], 5, [8])]
SUMS, ZEROS = state(0, [5.0, 2.0], 15, [7, 8])["window"], state(0, [0.0, 0.0], 0, [])["window"]


@pytest.mark.parametrize(
    ("rank", "processes", "seed", "window"),
    [(1, 2, 8, SAVED[1]["window"]), (0, 1, 7, SUMS), (0, 3, 7, SUMS), (1, 3, 8, ZEROS), (2, 3, None, ZEROS)],
)
def test_each_process_gets_its_own_window_or_the_first_the_sum_of_all(rank, processes, seed, window):
    mine = share_states(SAVED, rank, processes)
    assert mine["generators"] == ({"seed": seed} if seed else {})
    torch.testing.assert_close(mine["window"], window, rtol=0, atol=0)


def test_between_windows_there_is_nothing_to_share():
    closed = [{"generators": {}, "window": {}}] * 2
    assert share_states(closed, 0, 1)["window"] == share_states(closed, 2, 3)["window"] == {}


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batches", "now", "refused"),
    [
        (3, 4, None),
        (0, 2, None),  # where no window is open, it may change
        (3, 2, "accumulate_grad_batches was 4 and is 2, .*after 3 of its 4 .*Set it to 4"),
    ],
)
def test_an_open_window_keeps_its_number_of_micro_batches(micro_batches, now, refused):
    window = {"micro_batches": micro_batches} if micro_batches else {}
    content = {"inside_batch": False, "trainer": {"accumulate_grad_batches": 4}, "window": window}
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        check_save_point(content, now)


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_another_tokenizer_than_that_of_the_checkpoint_or_of_the_adapter_folder_is_reported(
    tiny_base, rows_file, tmp_path, capsys
):
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}

    def fit(**options):
        module = QLoRAModule(str(tiny_base), rank=2, compute_dtype="fp32", **options)
        data = InstructionDataModule(train=str(rows_file), test=str(rows_file), batch_size=2)
        trainer = lightning.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path)
        trainer.fit(module, data)
        return trainer, module, data

    trainer, module, data = fit()
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module.save_adapter(tmp_path / "adapter", data.tokenizer)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content[KEY]["identity"]["data"]["tokenizer"] = "another"
    torch.save(content, tmp_path / "other.ckpt")
    file = tmp_path / "adapter" / "qlora_lightning.json"
    identity = json.loads(file.read_text())
    identity["data"] |= {"tokenizer": "another", "train": "other rows, which are no matter here"}
    file.write_text(json.dumps(identity))

    capsys.readouterr()
    for name, reported in (("x", False), ("other", True)):
        trainer.test(module, data, ckpt_path=tmp_path / f"{name}.ckpt", weights_only=True, verbose=False)
        said = capsys.readouterr().out
        assert ("Other than in the checkpoint: tokenizer (another there, " in said) is reported
    fit(adapter=str(tmp_path / "adapter"))
    said = capsys.readouterr().out
    assert f"Other than in the adapter folder {tmp_path}/adapter: tokenizer (another there, " in said
    assert "training samples" not in said
