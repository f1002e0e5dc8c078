import pytest
import torch

from qlora_lightning.data.batches.order import choose_seed, describe_other_seed


class Strategy:
    """The second of two processes, that hears the first one's seed."""

    def broadcast(self, seed):
        return 99


class Trainer:
    world_size, strategy = 2, Strategy()


def test_the_seed_is_that_of_seed_everything_else_torchs(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert choose_seed(None) == 5
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert choose_seed(None) == torch.initial_seed()
    assert choose_seed(Trainer()) == 99


@pytest.mark.parametrize(
    ("stored", "own", "asked", "told"),
    [
        (7, 8, "8", True),
        (7, 7, "7", False),
        (7, 8, None, False),  # torch's, which nobody asked for
        (None, 8, "8", False),  # a checkpoint without one
    ],
)
def test_another_seed_than_the_checkpoints_is_told_where_it_was_asked_for(monkeypatch, stored, own, asked, told):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if asked:
        monkeypatch.setenv("PL_GLOBAL_SEED", asked)
    words = describe_other_seed(stored, own)
    assert (words is not None) is told
    assert not told or words.startswith("seed_everything is 8, but the checkpoint's 7 rules")
