import pytest

from qlora_lightning.model.memory.out_of_memory import MemorySettings, cheapest_changes

LENGTHS = [100] * 99 + [2_000]


def test_the_cheapest_come_first_and_no_more_than_three():
    settings = MemorySettings(
        rows=8, accumulate=3, batch_size=8, quantization="int8", lengths=LENGTHS, layers=30, all_layers=True
    )
    assert cheapest_changes(settings) == [
        "data.batch_size: 4 with trainer.accumulate_grad_batches: 6 (a step's rows stay as before)",
        "gradient_checkpointing.enabled: true (the same result, about a third slower)",
        "model.quantization: nf4",
    ]


def test_what_is_done_already_is_not_proposed():
    settings = MemorySettings(rows=1, batch_size=8, checkpoints=True, lengths=LENGTHS, layers=30, all_layers=True)
    assert cheapest_changes(settings) == [
        "data.max_length: 100 (shortens 1 of 100 rows)",
        "model.layers: last:15 (trains, and keeps activations of, the upper half only)",
    ]


@pytest.mark.parametrize(("size", "smaller", "accumulate"), [(6, 3, 2), (9, 3, 3), (7, 1, 7), (2, 1, 2)])
def test_a_step_keeps_its_rows(size, smaller, accumulate):
    change = cheapest_changes(MemorySettings(rows=size, batch_size=size, checkpoints=True))[0]
    assert change.startswith(f"data.batch_size: {smaller} with trainer.accumulate_grad_batches: {accumulate} ")


@pytest.mark.parametrize(
    ("budget", "longest", "expected"),
    [
        (4096, 1000, "data.tokens_per_batch: 2048 with trainer.accumulate_grad_batches: 4 "),
        (4096, 3000, "data.tokens_per_batch: 3000 with trainer.accumulate_grad_batches: 3 "),  # room for the longest
        (4096, 4000, "data.max_length: 2000 (shortens 1 of 1 rows)"),
    ],
)
def test_a_budget_of_tokens_keeps_room_for_the_longest_row(budget, longest, expected):
    settings = MemorySettings(accumulate=2, tokens_per_batch=budget, checkpoints=True, lengths=[longest])
    assert cheapest_changes(settings)[0].startswith(expected)


def test_validation_keeps_no_activations():
    settings = MemorySettings(training=False, rows=8, batch_size=8, layers=30, all_layers=True)
    assert cheapest_changes(settings) == ["data.batch_size: 4"]


def test_where_nothing_is_left_the_base_is_too_large():
    assert cheapest_changes(MemorySettings(checkpoints=True)) == ["a smaller model.base"]
