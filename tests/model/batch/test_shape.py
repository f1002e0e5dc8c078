import torch

from qlora_lightning.model.batch import BatchShape, shape_of_batch

SHAPE = BatchShape(lengths=(10, 20, 30), labelled=30, seen=(9, 19, 29), shared=(4, 0, 4))


def test_computed_are_the_tokens_that_something_needs_once():
    assert SHAPE.tokens == 60
    assert SHAPE.attended == (9, 19, 29)
    assert SHAPE.computed == 57 - 8


def test_whole_all_tokens_are_computed():
    whole = SHAPE.whole()
    assert (whole.tokens, whole.attended, whole.computed) == (60, (10, 20, 30), 60)


def test_cut_and_thinned_out_it_keeps_its_proportions():
    assert SHAPE.cut(12) == BatchShape((10, 12, 12), 17, (9, 12, 12), (4, 0, 4))
    assert SHAPE.longest(2) == BatchShape((30, 20), 25, (29, 19), (0, 0))
    assert BatchShape((10, 20), 3).longest(1) == BatchShape((20,), 2)


def test_it_is_read_from_a_batch():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 6]])
    labels = torch.tensor([[-100, -100, -100, 4, -100, -100, -100, 5, -100]])
    shape = shape_of_batch({"input_ids": ids, "labels": labels, "cu_seqlens": torch.tensor([0, 4, 9])})
    assert shape == BatchShape((4, 5), 2, (3, 3), (0, 2))
