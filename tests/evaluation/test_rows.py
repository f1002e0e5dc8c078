"""Rows have the losses and answers that they have alone, whatever batch they come in."""

from types import SimpleNamespace

import pytest
import torch

from qlora_lightning import Evaluation, InstructionDataModule, LossSums, QLoRAModule
from qlora_lightning.evaluation.row_results import AnswerSettings, evaluate_sides, row_losses, unpack_rows
from qlora_lightning.evaluation.scores import find_scores
from tests.packed import collate
from tests.rows import write_rows
from tests.steps import make_module

NO = -100


@pytest.fixture(scope="module")
def module(tiny_base):
    return make_module(tiny_base).eval()


@pytest.fixture(scope="module")
def data(tiny_base, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"Count to {n}." + " Please." * (n % 4), "output": "1 2 3 "[: n + 1]} for n in range(1, 17)]
    write_rows(file, rows)
    made = InstructionDataModule(val=str(file), tokenizer=str(tiny_base), batch_size=5, system="Count, please.")
    made.setup("validate")
    return made


@pytest.fixture(scope="module")
def batches(data):
    """Sixteen rows in batches of five; one has no labels."""
    found = list(data.val_dataloader())
    bounds = found[0]["cu_seqlens"].tolist()
    found[0]["labels"][:, bounds[3] : bounds[4]] = NO
    return found


@torch.no_grad()
def values(losses):
    return [(float(each.loss_sum), int(each.count), int(each.metrics["token_accuracy"])) for each in losses]


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}])
def test_rows_together_have_the_losses_of_each_alone(tiny_base, batches, options):
    module = make_module(tiny_base, micro_batch_tokens=1, **options).eval()
    together = [each for batch in batches for each in values(row_losses(module, batch))]
    rows = [row for batch in batches for row in module.cutter.cut(batch)]
    alone = [each for each in values(map(module.compute_loss, rows)) if each[1]]
    assert len(together) == len(alone) == sum(len(unpack_rows(batch)) for batch in batches) == 15
    assert [each[1:] for each in together] == [each[1:] for each in alone]
    assert [each[0] for each in together] == pytest.approx([each[0] for each in alone], rel=1e-5)


def test_an_overridden_loss_is_given_rows_one_by_one_and_a_batch_of_another_kind_whole(tiny_base, batches):
    class HalfLoss(QLoRAModule):
        def compute_loss(self, batch):
            assert len(batch.rows) == 1  # it may mix rows
            sums = super().compute_loss(batch)
            return LossSums(0.5 * sums.loss_sum, sums.count, sums.metrics)

    usual = make_module(tiny_base).eval()
    expected = [0.5 * nll for nll, *_ in values(row_losses(usual, batches[0]))]
    usual.__class__ = HalfLoss
    assert [nll for nll, *_ in values(row_losses(usual, batches[0]))] == pytest.approx(expected, rel=1e-5)
    sums = LossSums(torch.tensor(1.0), torch.tensor(2), {"token_accuracy": torch.tensor(1)})
    usual.compute_loss = lambda batch: sums
    other = {"x": torch.zeros(1)}
    assert list(row_losses(usual, other)) == [sums]
    assert [(row.number, row.prompt) for row in unpack_rows(other)] == [(-1, None)]


@pytest.mark.parametrize("training", [True, False])
def test_the_first_rows_are_answered_scored_and_reported_as_they_come(module, data, batches, training):
    rows = [row for batch in batches for row in unpack_rows(batch)][:2]
    settings = AnswerSettings(data.tokenizer, data.stop_ids, find_scores(["exact_match", "chrf"]), 3, batch_size=1)
    module.train(training)
    as_they_come = []
    options = {"on_answers": lambda *batch: as_they_come.append(batch)}
    results = evaluate_sides(module, batches, rows, settings, {"mine": "default"}, **options)
    assert {part.training for part in module.modules()} == {training}
    answers = module.answer([row.prompt for row in rows], data.stop_ids, 3)
    for result, ids in zip(results["mine"], answers, strict=False):
        assert result.answer.text == data.tokenizer.decode(ids).strip()
        assert (result.answer.tokens, result.answer.stopped) == (len(ids), len(ids) < 3)
        assert result.answer.scores.keys() == {"exact_match", "chrf"}
    assert list(results) == ["base", "mine"]
    assert [each.answer for each in results["mine"][2:]] == [None] * 13
    assert [side for side, *_ in as_they_come] == ["base", "base", "mine", "mine"]
    found = {(side, row.number): answer for side, (row,), (answer,) in as_they_come}
    assert found == {(side, row.number): results[side][n].answer for side in results for n, row in enumerate(rows)}


def test_the_last_run_of_labels_is_the_answer_and_all_before_it_the_prompt():
    samples = [([1, 2, 3], [NO, NO, 3], 4, 1), ([5, 6], [NO, NO], -1)]  # the second is a filler without labels
    samples.append(([1, 2, 9, 3, 4, 9, 5], [NO, 2, 9, NO, 4, 9, NO], 2))
    first, second = unpack_rows(collate(*samples))
    assert (first.number, first.source, first.prompt, first.expected) == (4, "1", [1, 2], [3])
    assert (second.number, second.source, second.prompt, second.expected) == (2, "0", [1, 2, 9, 3], [4, 9])


@pytest.mark.parametrize(("length", "limit"), [(3, 32), (40, 80), (900, 512)])
def test_an_answer_is_cut_at_twice_the_longest_expected_one_within_bounds(data, length, limit):
    rows = unpack_rows(collate(([1] * (length + 2), [NO] * 2 + [1] * length, 0)))
    settings = Evaluation().choose_settings(SimpleNamespace(world_size=1, datamodule=data), rows)
    assert settings.max_new_tokens == limit
