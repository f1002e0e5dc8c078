import pytest
import torch

from qlora_lightning import InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.model import row_losses
from qlora_lightning.model.batch import cut_into_rows
from qlora_lightning.model.row_losses import losses_of_rows


class HalfLoss(QLoRAModule):
    def compute_loss(self, batch):
        assert len(batch["row_ids"]) == 1  # a loss that may mix rows is given them one by one
        sums = super().compute_loss(batch)
        return sums._replace(nll_sum=0.5 * sums.nll_sum)


def made(cls, base, **options):
    module = cls(base=str(base), compute_dtype="fp32", **options)
    module.configure_model()
    return module.eval()


@pytest.fixture
def rows(tiny_base, rows_file):
    data = InstructionDataModule(val=str(rows_file), tokenizer=str(tiny_base), batch_size=16, system="Count, please.")
    data.setup("validate")
    return cut_into_rows(next(iter(data.val_dataloader())))


def values(losses):
    return [(float(each.nll_sum), int(each.labelled_tokens), int(each.correct)) for each in losses]


@pytest.mark.parametrize("most_tokens", [1, 100, 2048])
@pytest.mark.parametrize("options", [{}, {"fast": False}, {"quantization": "int8"}], ids=str)
def test_rows_together_have_the_losses_of_each_alone(tiny_base, rows, monkeypatch, most_tokens, options):
    monkeypatch.setattr(row_losses, "_MOST_TOKENS", most_tokens)
    module = made(QLoRAModule, tiny_base, **options)
    with torch.no_grad():
        together, alone = (values(each) for each in (losses_of_rows(module, rows), map(module.compute_loss, rows)))
    assert len(together) == 16
    assert [each[1:] for each in together] == [each[1:] for each in alone]
    assert [each[0] for each in together] == pytest.approx([each[0] for each in alone], rel=1e-5)


def test_they_go_through_the_model_together(tiny_base, rows, monkeypatch):
    module, passes = made(QLoRAModule, tiny_base), []
    module.causal_lm.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        list(losses_of_rows(module, rows))
    assert len(passes) == 1


def test_a_row_without_labels_has_a_loss_of_nothing(tiny_base, rows):
    module = made(QLoRAModule, tiny_base)
    rows[3]["labels"] = torch.full_like(rows[3]["labels"], -100)
    with torch.no_grad():
        together = values(losses_of_rows(module, rows))
    assert together[3] == (0.0, 0, 0)
    assert together[4][1] > 0


def test_an_overridden_loss_counts(tiny_base, rows):
    usual, half = made(QLoRAModule, tiny_base), made(HalfLoss, tiny_base)
    with torch.no_grad():
        expected = [0.5 * nll for nll, *_ in values(losses_of_rows(usual, rows))]
        assert [nll for nll, *_ in values(losses_of_rows(half, rows))] == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_another_make_is_judged_as_a_whole(tiny_base):
    module = made(QLoRAModule, tiny_base)
    sums = LossSums(torch.tensor(1.0), torch.tensor(2), torch.tensor(1))
    module.compute_loss = lambda batch: sums
    assert list(losses_of_rows(module, [{"x": torch.zeros(1)}])) == [sums]
