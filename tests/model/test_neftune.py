import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.data.batches.collate import collate
from qlora_lightning.data.samples.sample import make_sample
from qlora_lightning.model.neftune import add_noise, check_neftune_alpha
from qlora_lightning.support.errors import UserError


def test_noise_of_a_token_follows_the_length_of_its_own_sample():
    width, lengths, alpha = 64, [4, 100], 5.0
    embeddings = torch.zeros(1, sum(lengths), width)
    torch.manual_seed(0)
    noise = add_noise(embeddings, torch.tensor([0, 4, 104], dtype=torch.int32), alpha)[0]
    for length, part in zip(lengths, noise.split(lengths), strict=True):
        bound = alpha / (length * width) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound
        assert part.abs().mean() == pytest.approx(bound / 2, rel=0.1)  # uniform
        # the expected norm of the whole sample's noise is alpha / sqrt(3), whatever its length
        assert part.norm() == pytest.approx(alpha / 3**0.5, rel=0.1)


def test_noise_has_the_dtype_of_the_embeddings_and_comes_from_torchs_generator():
    embeddings, bounds = torch.ones(1, 3, 8, dtype=torch.bfloat16), torch.tensor([0, 3])
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(add_noise(embeddings, bounds, 5.0))
    assert made[0].dtype == torch.bfloat16
    assert torch.equal(*made)


@pytest.fixture
def make_module(tiny_base):
    return lambda **options: QLoRAModule(base=str(tiny_base), rank=2, **options)


@pytest.fixture
def batch():
    return collate([make_sample(ids, [-100, *ids[1:]], n) for n, ids in enumerate([[5, 6, 7, 8], [9, 10, 11]])])


def loss(module, batch):
    torch.manual_seed(0)
    return module.compute_loss(batch).nll_sum.item()


def test_noise_is_there_in_training_only(make_module, batch):
    plain, noisy, whisper = (make_module(neftune_alpha=alpha) for alpha in (None, 5.0, 1e-30))
    for module in (plain, noisy, whisper):
        module.configure_model()
    assert loss(noisy, batch) != loss(plain, batch)
    assert loss(whisper, batch) == loss(plain, batch)  # below what a float32 holds: embedding first changes nothing
    noisy.eval(), plain.eval()
    assert loss(noisy, batch) == loss(plain, batch)


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), float("nan")])
def test_a_strength_that_is_none_is_refused(alpha):
    with pytest.raises(UserError, match="expected a positive number, such as 5, or null"):
        check_neftune_alpha(alpha)
