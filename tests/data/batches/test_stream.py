import itertools
import json
import logging
import random
from pathlib import Path

import pytest
import torch

from qlora_lightning.data.batches import stream
from qlora_lightning.data.batches.stream import StreamLoader
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.prepare import Recipe
from qlora_lightning.data.rows.sources import RowSettings, find_sources
from qlora_lightning.model.device import read_memory
from qlora_lightning.support.errors import UserError


def pairs(count, first=0):
    return [{"prompt": f"q{number}", "completion": "k" * (1 + number % 3)} for number in range(first, first + count)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 8)


@pytest.fixture
def make(characters, write):
    """A loader of 20 rows, in blocks of 8 rows and 4 batches."""
    write("train.jsonl", pairs(20))
    recipe = Recipe(ChatRenderer(characters))

    def make(value="train.jsonl", length=12, **kwargs):
        if "tokens_per_batch" not in kwargs:
            kwargs = {"batch_size": 2} | kwargs
        return StreamLoader(find_sources(value, "train"), recipe, length, **{"seed": 7} | kwargs)

    return make


def rows(batches):
    return [batch["row_ids"].tolist() for batch in batches]


def flat(batches):
    return [row for batch in rows(batches) for row in batch]


def said(batch):
    return "".join(map(chr, batch["input_ids"][0].tolist()))


def test_blocks_are_shuffled_one_after_the_other_and_the_data_begin_again(make):
    batches = list(make())
    blocks = [flat(batches[at : at + 4]) for at in (0, 4, 8)]
    assert [sorted(block) for block in blocks] == [list(range(at, at + 8)) for at in (0, 8, 16)]
    orders = {tuple(row % 8 for row in block) for block in blocks}
    assert len(orders | {tuple(range(8))}) == 4
    row_22 = next(batch for batch in batches if 22 in batch["row_ids"])
    assert "{u\nq2}\n{a\nkkk}\n" in said(row_22)  # 20 rows before, then q0, q1, q2


def test_the_order_is_a_pure_function_of_the_seed(make):
    assert rows(make()) == rows(make())
    assert rows(make()) != rows(make(seed=8))


def test_the_length_is_that_of_the_run(make):
    for length in (1, 4, 5, 12):
        loader = make(length=length)
        assert len(loader) == len(list(loader)) == length
        assert list(loader) == []  # the run is over


@pytest.mark.parametrize("batches", [{"batch_size": 2}, {"tokens_per_batch": 50}, {"batch_size": 3, "world_size": 2}])
def test_it_goes_on_exactly_from_every_position(make, batches):
    whole = list(make(**batches))
    loader = make(**batches)
    walk = iter(loader)
    for position in range(13):
        state = loader.state_dict()
        assert json.loads(json.dumps(state)) == state
        again = make(**batches)
        iter(again)  # Lightning tries whether it is iterable
        again.load_state_dict(state)
        assert again.state_dict() == state
        rest = list(again)
        assert rows(rest) == rows(whole[position:])
        assert [said(batch) for batch in rest] == [said(batch) for batch in whole[position:]]
        next(walk, None)


@pytest.mark.parametrize(
    "changed",
    [{"batch_size": 4}, {"seed": 8}, {"tokens_per_batch": 50}, {"value": {"path": "train.jsonl", "weight": 2}}],
)
def test_a_position_in_another_stream_is_refused(make, changed):
    state = make().state_dict()
    with pytest.raises(UserError, match=r"saved inside a stream with .*keep files, weights and batches as they were"):
        make(**changed).load_state_dict(state)


def test_a_position_in_other_files_is_refused(make, write):
    state = make().state_dict()
    write("train.jsonl", pairs(21))
    with pytest.raises(UserError, match=r"sources = \[\['train.jsonl', \d+\]\]"):
        make().load_state_dict(state)


def test_weights_give_each_source_its_share_of_every_block(make, write):
    write("few.jsonl", pairs(3, first=100))
    loader = make([{"path": "train.jsonl", "weight": 3}, {"path": "few.jsonl", "weight": 1}])
    sources = [source for batch in loader for source in batch["source"].tolist()]
    assert [sources[at : at + 8].count(1) for at in (0, 8, 16)] == [2, 2, 2]


def test_ranks_share_the_rows_of_a_pass(make, write):
    write("train.jsonl", pairs(16))
    ranks = [rows(make(length=4, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(itertools.chain(*ranks[0], *ranks[1])) == list(range(16))
    together = [a + b for a, b in zip(*ranks, strict=True)]
    assert together == rows(make(length=4, batch_size=4))  # one process with as many rows at once


def test_blocks_are_whole_batches_of_all_ranks(make):
    assert make(batch_size=3).block_rows == 9
    assert make(batch_size=3, world_size=4).block_rows == 12
    assert make(tokens_per_batch=50).block_rows == 8


def test_batches_are_full_of_tokens(make, write, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 1_000)
    lengths = random.Random(0)
    long = [max(60, round(lengths.gauss(190, 70))) for _ in range(2_000)]  # as GSM8K's
    write("long.jsonl", [{"prompt": "q", "completion": "k" * (length - 12)} for length in long])
    loader = make("long.jsonl", length=10_000, tokens_per_batch=2_048)
    two_blocks = itertools.takewhile(lambda _: loader.report.rows <= 2_000, loader)
    tokens = [batch["input_ids"].shape[1] for batch in two_blocks]
    assert max(tokens) <= 2_048
    assert sum(tokens) / (len(tokens) * 2_048) >= 0.95


def put_bad_row(line, text="no json"):
    lines = Path("train.jsonl").read_text().splitlines()
    lines[line - 1] = text
    Path("train.jsonl").write_text("\n".join(lines))


def test_a_bad_row_stops_the_run_when_its_block_is_reached(make):
    put_bad_row(13)
    walk = iter(make())
    assert sorted(flat(itertools.islice(walk, 4))) == list(range(8))
    with pytest.raises(UserError, match=r"^1 row cannot be used:\n  train.jsonl:13: not JSON.*\n.*on_bad_row: skip"):
        next(walk)


def test_bad_rows_are_skipped_and_counted_where_that_was_asked_for(make):
    put_bad_row(13)
    loader = make(length=8, skip_bad_rows=True)
    assert sorted(flat(loader)) == [row for row in range(16) if row != 12]
    assert (loader.report.rows, loader.report.bad_rows, loader.report.samples) == (16, 1, 15)


def test_skipping_ends_where_nothing_is_left(make, write):
    write("train.jsonl", [{"prompt": "q", "completion": ""}] * 3)
    with pytest.raises(UserError, match=r"train.jsonl:1: the answer \(message 2\) is empty"):
        next(iter(make(skip_bad_rows=True)))


def test_a_row_that_hides_the_rest_of_its_file_stops_in_any_case(make):
    text = json.dumps(pairs(5))[:-1] + ', {"prompt": }, {"prompt": "q", "completion": "k"}]'
    Path("train.json").write_text(text)
    with pytest.raises(UserError, match=r"train\.json is not a JSON array"):
        next(iter(make("train.json", skip_bad_rows=True)))


def test_rows_without_a_label_stop_it_where_they_are_too_many(make, write, talk):
    said, unsaid = ([*talk("q", "k")[:1], talk("q", "k")[1] | marks] for marks in ({}, {"train": False}))
    write("train.jsonl", [{"messages": unsaid}] + [{"messages": said}] * 15)
    with pytest.raises(UserError, match="1 of 8 rows of train have no labelled token"):
        next(iter(make()))
    write(
        "train.jsonl", [{"messages": said}] * 15 + [{"messages": unsaid}]
    )  # a sorted file must not stop it on its way
    assert len(rows(make())) == 12


def test_the_first_block_is_looked_at_beforehand_and_read_again(make):
    loader = make()
    samples, report = loader.first_block()
    assert sorted(samples.row_ids.tolist()) == list(range(8))
    assert (report.rows, report.formats, loader.report.rows) == (8, ["prompt_completion"], 0)
    assert rows(loader) == rows(make())


def test_of_few_rows_each_is_looked_at_once(make, write):
    write("train.jsonl", [*pairs(4), {"prompt": "q"}])
    with pytest.raises(UserError, match=r"^1 row cannot be used"):
        make().first_block()
    samples, report = make(skip_bad_rows=True).first_block()
    assert samples.row_ids.tolist() == [0, 1, 2, 3]
    assert (report.rows, report.bad_rows) == (5, 1)


def test_memory_does_not_grow_with_the_rows(make, write, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 1_000)
    write("long.jsonl", [{"prompt": f"q{number}", "completion": "k" * 400} for number in range(20_000)])
    loader, used = make("long.jsonl", length=20_000 // 50, batch_size=50), {}
    for batch in loader:
        used[int(batch["row_ids"].max()) // 1_000] = read_memory(torch.device("cpu"))["private_memory_gib"] * 1024
    assert used[19] - used[4] < 16  # MiB, some of it left by other tests; the samples themselves would be 46


def test_columns_are_checked_on_the_first_block(make, characters):
    sources = find_sources("train.jsonl", "train", settings=RowSettings(columns={"promt": "question"}))
    loader = StreamLoader(sources, Recipe(ChatRenderer(characters)), 1, batch_size=2)
    with pytest.raises(UserError, match=r"columns: no row has 'promt'.*Did you mean 'prompt'"):
        loader.first_block()


def test_rows_that_are_skipped_on_the_way_are_told(make, write, caplog):
    write("train.jsonl", [*pairs(12), {"prompt": "q", "completion": ""}, *pairs(3)])
    with caplog.at_level(logging.INFO, logger="qlora_lightning"):
        list(make(skip_bad_rows=True, length=8))
    assert "rows 9 to 16: train: 8 rows" in caplog.text
    assert "1 bad rows skipped: train.jsonl:13 (the answer (message 2) is empty)" in caplog.text
