import pytest
import torch

from qlora_lightning.data.batches.collate import collate, collate_rows
from qlora_lightning.data.samples import Sample, gather_samples, mute

SAMPLES = [
    Sample(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7]), 4, 0),
    Sample(torch.tensor([8, 9]), torch.tensor([8, 9]), 1, 2),
]


def test_two_samples_end_to_end():
    batch = collate(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]  # nothing is predicted across samples
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    assert batch["longest"] == 3
    assert batch["row_ids"].tolist() == [4, 1]
    assert batch["source"].tolist() == [0, 2]
    kinds = {key: value.dtype for key, value in batch.items() if key != "longest"}
    assert kinds.pop("cu_seqlens") == torch.int32
    assert set(kinds.values()) == {torch.int64}


@pytest.mark.parametrize("rows", [[0], [1, 0], [1, 1, 0]])
@pytest.mark.parametrize("filler", [False, True])
def test_rows_of_a_set_make_the_batch_that_their_samples_make(rows, filler):
    batch = collate_rows(gather_samples(SAMPLES), rows, filler)
    chosen = [mute(SAMPLES[row]) if filler else SAMPLES[row] for row in rows]
    for key, expected in collate(chosen).items():
        if key == "longest":
            assert batch[key] == expected
        else:
            torch.testing.assert_close(batch[key], expected, rtol=0, atol=0)
