import pytest
import torch

from qlora_lightning import QLoRAModule
from qlora_lightning.data.batches.collate import collate
from qlora_lightning.data.samples.sample import make_sample
from qlora_lightning.model.guards.checks import check_token_ids
from qlora_lightning.support.errors import UserError


def batch_of(*rows):
    return collate([make_sample(ids, [-100, *ids[1:]], number) for number, ids in enumerate(rows)])


def test_ids_of_the_vocabulary_pass():
    check_token_ids(batch_of([0, 1], [9, 5]), 10, None)


@pytest.mark.parametrize("bad", [10, 11, -1])
def test_another_id_is_refused_with_its_row(bad):
    with pytest.raises(UserError, match=f"A token of .*1.* has the id {bad}, and .* only for ids below 10: "):
        check_token_ids(batch_of([0, 1, 2], [3, 4, bad], [5, 6]), 10, None)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_a_stop_token_that_the_base_lacks_stops_the_run(tiny_base, compute_dtype, fast):
    """It stands only at the end of the row, where no embedding is looked up."""
    module = QLoRAModule(base=str(tiny_base), compute_dtype=compute_dtype, fast=fast)
    module.configure_model()
    vocabulary = module.causal_lm.config.vocab_size
    module.compute_loss(batch_of([5, 6, vocabulary - 1]))
    with torch.no_grad(), pytest.raises(UserError, match="tokens that the base lacks"):
        module.compute_loss(batch_of([5, 6, vocabulary]))
