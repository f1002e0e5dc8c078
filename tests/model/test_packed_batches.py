"""Rows that are packed have the states that they have alone."""

import itertools
import shutil

import pytest
import torch

from qlora_lightning.cli import main
from tests.rows import change_json
from tests.steps import distance, make_batch, make_module

LENGTHS = (9, 30, 64, 5)


@torch.no_grad()
def states_by_sample(module, batch):
    micro_batch = module.micro_batch_of(batch)
    return module.last_states(micro_batch)[0].float().split(micro_batch.counts)


def assert_states_as_alone(module, batch, tolerance):
    rows = torch.arange(len(batch["cu_seqlens"]) - 1)
    together, parts = states_by_sample(module, batch), module.cutter.cut(batch | {"row_ids": rows, "source": rows})
    alone = [states for part in parts for states in states_by_sample(module, part)]
    assert len(parts) == len(together) == len(rows)
    assert max(map(distance, together, alone)) <= tolerance


@pytest.mark.parametrize("base", ["tiny_base", pytest.param("smollm2_folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_a_sample_has_the_states_that_it_has_alone_and_no_other_changes_a_bit_of_them(request, base, compute_dtype):
    """Alone to rounding: in which order a library sums up a product depends on its number of rows, and on the CPU."""
    module = make_module(request.getfixturevalue(base), compute_dtype=compute_dtype, micro_batch_tokens=1).eval()
    batch, others = make_batch(LENGTHS), make_batch(LENGTHS, seed=2)["input_ids"]
    # bf16 puts SmolLM2's states up to 4e-2 from those in fp32
    assert_states_as_alone(module, batch, tolerance=1e-5 if compute_dtype == "fp32" else 5e-2)
    together = states_by_sample(module, batch)
    for sample, (start, end) in enumerate(itertools.pairwise(batch["cu_seqlens"].tolist())):
        ids = others.clone()
        ids[:, start:end] = batch["input_ids"][:, start:end]
        assert torch.equal(states_by_sample(module, {**batch, "input_ids": ids})[sample], together[sample])


@pytest.mark.slow
def test_rows_that_would_turn_each_other_are_refused(tiny_base, rows_file, tmp_path, capsys):
    """Dynamic NTK rotary embedding scales by the longest row of a batch: here beyond 40 tokens; shorter ones train."""
    base = shutil.copytree(tiny_base, tmp_path / "dynamic")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    change_json(base / "config.json", max_position_embeddings=40, rope_parameters=rope)
    options = ["--model.base", str(base), "--data.train", str(rows_file), "--data.batch_size", "4"]
    options += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    assert main(["fit", *options, "--data.max_length", "41"]) == 2
    assert "Set data.max_length to 40 or less" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    module = make_module(base, quantization="none", micro_batch_tokens=1).eval()
    assert_states_as_alone(module, make_batch((9, 30, 40, 5)), tolerance=1e-5)

    change_json(base / "config.json", max_position_embeddings=8, rope_parameters={**rope, "rope_type": "default"})
    assert main(["fit", *options, "--trainer.max_steps", "1"]) == 0
    assert "the base was pre-trained on 8: set data.max_length to that" in capsys.readouterr().out
