import torch

from qlora_lightning.data.batches import collate
from qlora_lightning.data.samples import Sample


def test_two_samples_end_to_end():
    first = Sample(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7]), 4, 0)
    second = Sample(torch.tensor([8, 9]), torch.tensor([8, 9]), 1, 2)
    batch = collate([first, second])
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
