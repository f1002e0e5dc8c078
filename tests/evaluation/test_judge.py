"""Rows are cut, judged and answered alone as in their batch."""

import pytest
import torch

from qlora_lightning import InstructionDataModule, QLoRAModule
from qlora_lightning.evaluation.judge import Answering, choose_max_new_tokens, cut_rows, judge_rows, split_sample
from qlora_lightning.evaluation.report import last_turn
from qlora_lightning.model.loss import TokenStatistics
from tests.flat import collate

NO = -100


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


def test_the_last_run_of_labels_is_the_answer_and_all_before_it_the_prompt():
    assert split_sample([1, 2, 3, 4], [NO, NO, 3, 4]) == ([1, 2], [3, 4])
    turns = [1, 2, 9, 3, 4, 9, 5], [NO, 2, 9, NO, 4, 9, NO]
    assert split_sample(*turns) == ([1, 2, 9, 3], [4, 9])


def test_a_batch_is_cut_into_its_rows_without_fillers():
    samples = [([1, 2, 3], [NO, NO, 3], 4, 1), ([5, 6], [NO, NO], -1)]
    samples.append(([7, 8, 9], [NO, NO, 9], 2))
    first, second = cut_rows(collate(*samples))
    assert (first.number, first.source, first.prompt, first.expected) == (4, 1, [1, 2], [3])
    assert (second.number, second.source, second.prompt, second.expected) == (2, 0, [7, 8], [9])
    assert torch.equal(second.batch["position_ids"], torch.tensor([[0, 1, 2]]))


def test_the_last_turn_lies_between_the_last_two_stop_tokens():
    assert last_turn([8, 1, 0, 5, 6, 0, 7], [0]) == [5, 6]
    assert last_turn([5, 6, 0, 7], [0]) == [5, 6]
    assert last_turn([5, 6], [0]) == [5, 6]


def test_the_limit_is_twice_the_longest_answer_within_bounds():
    rows = cut_rows(collate((list(range(60)), [NO] * 20 + list(range(20, 60)), 0)))
    assert choose_max_new_tokens(rows) == 80
    assert choose_max_new_tokens([]) == 32
    assert choose_max_new_tokens(cut_rows(collate(([1, 2, 3], [NO, NO, 3], 0)))) == 32
    long = cut_rows(collate(([0] * 900, [NO] * 2 + [1] * 898, 0)))
    assert choose_max_new_tokens(long) == 512
