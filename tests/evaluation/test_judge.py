import pytest
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.evaluation.judge import Answering, judge_rows
from qlora_lightning.evaluation.rows import cut_rows
from qlora_lightning.model.loss import TokenStatistics


@pytest.fixture(scope="module")
def module(tiny_base):
    made = QLoRAModule(base=str(tiny_base), compute_dtype="fp32")
    made.configure_model()
    return made


@pytest.fixture
def data(tiny_base, rows_file):
    made = InstructionDataModule(val=str(rows_file), tokenizer=str(tiny_base), batch_size=5)
    made.setup("validate")
    return made


def test_losses_of_rows_add_up_to_the_loss_of_the_validation(module, data):
    statistics, rows = TokenStatistics(), []
    with torch.no_grad():
        for batch in data.val_dataloader():
            statistics.update(module.compute_loss(batch))
            rows += cut_rows(batch)
    judgements = judge_rows(module, rows, watch=(steps := []).append)
    tokens = sum(each.labelled_tokens for each in judgements)
    assert tokens == int(statistics.labelled_tokens)
    assert sum(each.correct for each in judgements) == int(statistics.correct)
    assert sum(each.nll for each in judgements) / tokens == pytest.approx(float(statistics.compute()["loss"]), rel=1e-5)
    assert all(each.answer is None for each in judgements)
    assert sum(steps) == len(rows) == 16


def test_the_first_rows_are_answered_from_their_prompts_and_scored(module, data):
    rows = [row for batch in data.val_dataloader() for row in cut_rows(batch)]
    answering = Answering.of(rows, data.tokenizer, data.stop_ids, ["exact_match", "chrf"], max_new_tokens=3)
    judgements = judge_rows(module, rows, answering, answered=2, watch=(steps := []).append)
    answers = module.answer([row.prompt for row in rows[:2]], data.stop_ids, 3)
    assert [each.answer for each in judgements[:2]] == [data.tokenizer.decode(ids).strip() for ids in answers]
    assert [each.answer for each in judgements[2:]] == [None] * 14
    assert judgements[0].scores.keys() == {"exact_match", "chrf"}
    assert [each.stopped for each in judgements[:2]] == [len(ids) < 3 for ids in answers]
    assert [each.answer_tokens for each in judgements[:2]] == [len(ids) for ids in answers]
    assert sum(steps) == 16 + 2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(module, data, training):
    module.train(training)
    judge_rows(module, cut_rows(next(iter(data.val_dataloader()))))
    assert {part.training for part in module.modules()} == {training}
