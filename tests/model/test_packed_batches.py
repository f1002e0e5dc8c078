"""Rows that are packed have the losses that they have alone."""

import itertools
import json
import shutil

import pytest
import torch

from qlora_lightning import InstructionDataModule
from qlora_lightning.cli import main
from tests.steps import distance, make_batch, make_module

LENGTHS = (9, 30, 64, 5)
ROWS = torch.arange(len(LENGTHS))


def losses(base, file, **settings):
    """Compute the loss sum and labelled tokens of each row: of its batch with every other row's labels hidden."""
    data = InstructionDataModule(str(file), tokenizer=str(base), **settings)
    data.setup("fit")
    module, sums_by_row, most = make_module(base, quantization="none").eval(), {}, 0
    for batch in data.train_dataloader():
        bounds, rows = batch["cu_seqlens"].tolist(), batch["row_ids"].tolist()
        most = max(most, len(rows))
        for row, start, end in zip(rows, bounds, bounds[1:], strict=False):
            labels = torch.full_like(batch["labels"], -100)
            labels[:, start:end] = batch["labels"][:, start:end]
            with torch.no_grad():
                sums = module.compute_loss({**batch, "labels": labels})
            sums_by_row[row] = (sums.nll_sum.item(), int(sums.labelled_tokens))
    return sums_by_row, most


def test_packed_and_alone_each_row_has_the_same_loss(tiny_base, rows_file):
    packed, most = losses(tiny_base, rows_file, tokens_per_batch=200)
    alone, one = losses(tiny_base, rows_file, batch_size=1)
    assert most > 2
    assert one == 1
    assert {row: pytest.approx(sums, rel=1e-5) for row, sums in alone.items()} == packed
    assert len({round(nll, 3) for nll, _ in alone.values()}) == 16  # so that a swap would show


@pytest.mark.parametrize("base", ["tiny_base", pytest.param("smollm2_folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_sample_has_the_states_that_it_has_alone_and_no_other_changes_a_bit_of_them(request, base, compute_dtype):
    """Alone to rounding: in which order a library sums up a product depends on its number of rows, and on the CPU."""
    module = make_module(request.getfixturevalue(base), compute_dtype=compute_dtype, micro_batch_tokens=1).eval()
    batch, others = make_batch(LENGTHS), make_batch(LENGTHS, seed=2)["input_ids"]

    def states_by_sample(batch):
        with torch.no_grad():
            return module.last_states(batch)[0].float().split((batch["cu_seqlens"].diff() - 1).tolist())

    together, rows = states_by_sample(batch), module.micro_batches({**batch, "row_ids": ROWS, "source": ROWS})
    alone = [states for row in rows for states in states_by_sample(row)]
    # bf16 puts SmolLM2's states up to 4e-2 from those in fp32
    assert max(map(distance, together, alone)) <= (1e-5 if compute_dtype == "fp32" else 5e-2)
    for sample, (start, end) in enumerate(itertools.pairwise(batch["cu_seqlens"].tolist())):
        ids = others.clone()
        ids[:, start:end] = batch["input_ids"][:, start:end]
        assert torch.equal(states_by_sample({**batch, "input_ids": ids})[sample], together[sample])


def test_rows_that_would_turn_each_other_are_refused_and_shorter_ones_train_as_alone(
    tiny_base, rows_file, tmp_path, capsys
):
    """Dynamic NTK rotary embedding scales by the longest row of a batch: here beyond 40 tokens."""
    base = shutil.copytree(tiny_base, tmp_path / "dynamic")
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 40}
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    (base / "config.json").write_text(json.dumps(config))
    options = ["--model.base", str(base), "--data.train", str(rows_file), "--data.batch_size", "4"]
    options += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    assert main(["fit", *options, "--data.max_length", "41"]) == 2
    assert "Set data.max_length to 40 or less" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    together, single = (losses(base, rows_file, batch_size=size, max_length=40)[0] for size in (5, 1))
    assert {row: pytest.approx(sums, rel=1e-5) for row, sums in single.items()} == together
