"""Batches from rows that are read while training; that a whole run resumes exactly is tested in test_datamodule.py."""

import itertools
import json
import logging
import threading
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_lightning.data.batches.stream import RowStream, StreamLoader
from qlora_lightning.data.chat.labels import ChatRenderer
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.prepare import Recipe
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.support.errors import UserError


def pairs(count, first=0):
    return [{"prompt": f"q{number}", "completion": "k" * (1 + number % 3)} for number in range(first, first + count)]


@pytest.fixture
def make(characters, write):
    """A loader of 20 rows, in blocks of 8 rows and 4 batches."""
    write("train.jsonl", pairs(20))

    def make(value="train.jsonl", length=12, max_length=60, too_long="truncate", **kwargs):
        if "tokens_per_batch" not in kwargs:
            kwargs = {"batch_size": 2} | kwargs
        recipe = Recipe(ChatRenderer(characters), max_length, too_long)
        return StreamLoader(find_sources(value, "train"), recipe, length, **{"seed": 7, "shuffle_buffer": 8} | kwargs)

    return make


def rows(batches):
    return [batch["row_ids"].tolist() for batch in batches]


def flat(batches):
    return [row for batch in rows(batches) for row in batch]


def said(batch):
    return "".join(map(chr, batch["input_ids"][0].tolist()))


def run_ranks(make, world_size, **kwargs):
    """What each of several ranks trains; a rank that stops says why instead."""
    barrier, counts, found = threading.Barrier(world_size), [0] * world_size, [None] * world_size
    positions = [[] for _ in range(world_size)]

    def run(rank):
        def gather(count):
            counts[rank] = count
            barrier.wait(20)
            everyones = list(counts)
            barrier.wait(20)
            return everyones

        loader, batches = make(rank=rank, world_size=world_size, gather=gather, **kwargs), []
        try:
            for batch in loader:
                batches.append(batch)
                positions[rank].append({**loader.state_dict(), "made_of": None})
            found[rank] = batches
        except UserError as error:
            found[rank] = str(error)

    with ThreadPoolExecutor(world_size) as pool:
        list(pool.map(run, range(world_size)))
    assert all(of_rank == positions[0] for of_rank in positions)
    return found


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(write):
    """A stream of files a, b, … with 3, 4, … rows that say their file and number."""

    def make(*weights, position=None):
        entries = []
        for at, weight in enumerate(weights):
            file = write(f"{'abc'[at]}.jsonl", [{"is": f"{'abc'[at]}{number}"} for number in range(3 + at)])
            entries.append({"path": file, "weight": weight} if weight else file)
        return RowStream(find_sources(entries, "train"), None, position)

    return make


@pytest.fixture
def shards(write):
    """A folder of eight files of two rows."""
    Path("shards").mkdir()
    for shard in range(8):
        write(f"shards/{shard}.jsonl", [{"is": f"{shard}{row}", **pairs(1, 2 * shard + row)[0]} for row in range(2)])
    return "shards"


def taken(rows):
    return [row.values["is"] for _, _, row in rows]


def test_at_the_end_it_begins_again_and_each_source_has_its_share_evenly_spread(stream):
    assert taken(stream(None).take(7)) == ["a0", "a1", "a2", "a0", "a1", "a2", "a0"]
    assert taken(stream(3, 1).take(12, once=True)) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    it = stream(3, 1)
    assert "".join(taken(it.take(1))[0][0] for _ in range(8)) == "aabaaaba"
    assert taken(it.take(4)) == ["a0", "a1", "a2", "b2"]
    assert it.drawn == [9, 3]
    with pytest.raises(UserError, match=r"data.streaming: several sources.*give each a weight"):
        stream(None, None)


def test_the_files_of_a_source_come_in_another_order_in_each_pass_and_resume_exactly(shards):
    sources = find_sources(shards, "train")
    it, passes, positions = RowStream(sources, 3), [], []
    for _ in range(4):
        positions += [it.position()]
        passes.append(taken(it.take(16)))
    assert [sorted(each) for each in passes] == [sorted(passes[0])] * 4
    assert len({tuple(each) for each in passes}) == 4
    assert taken(RowStream(sources, None).take(16)) == sorted(passes[0])
    later = RowStream(sources, 3, positions[2])
    assert [taken(later.take(16)), taken(later.take(16))] == passes[2:]
    begun = RowStream(sources, 3)
    begun.take(19)
    assert taken(RowStream(sources, 3, begun.position()).take(13)) == passes[1][3:]
    first = find_sources({"path": shards, "rows": 3}, "train")  # of which the first rows are read in every pass
    assert [taken(RowStream(first, seed).take(6)) for seed in range(4)] == [["00", "01", "10"] * 2] * 4


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_blocks_are_shuffled_one_after_the_other_and_the_data_begin_again(make):
    batches = list(make())
    blocks = [flat(batches[at : at + 4]) for at in (0, 4, 8)]
    assert [sorted(block) for block in blocks] == [list(range(at, at + 8)) for at in (0, 8, 16)]
    assert len({tuple(row % 8 for row in block) for block in blocks} | {tuple(range(8))}) == 4
    row_22 = next(batch for batch in batches if 22 in batch["row_ids"])
    assert "{u\nq2}\n{a\nkkk}\n" in said(row_22)  # 20 rows before, then q0, q1, q2
    assert rows(make()) == rows(batches) != rows(make(seed=8))
    assert flat(make(shuffle=False)) == list(range(24))


WEIGHTED = [{"path": "train.jsonl", "weight": 3}, {"path": "few.jsonl", "weight": 1}]
STREAMS = [
    {"batch_size": 2},
    {"tokens_per_batch": 50},
    {"batch_size": 3, "world_size": 2},
    {"value": WEIGHTED},
]


@pytest.mark.parametrize("batches", STREAMS)
def test_it_resumes_exactly_from_every_position(make, write, batches):
    write("few.jsonl", pairs(3, first=100))
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
def test_a_position_in_another_stream_or_in_other_files_is_refused(make, write, changed):
    state = make().state_dict()
    with pytest.raises(UserError, match=r"saved inside a stream with .*keep files, weights and batches as they were"):
        make(**changed).load_state_dict(state)
    write("train.jsonl", pairs(21))
    with pytest.raises(UserError, match=r"sources = \[\['train.jsonl', \d+\]\]"):
        make().load_state_dict(state)


def test_a_window_holds_the_same_rows_on_one_rank_and_on_several(make, write):
    write("train.jsonl", pairs(40))
    alone = rows(make(length=4, batch_size=8, shuffle_buffer=16))
    for world_size, batch_size in ((8, 1), (2, 4)):
        found = run_ranks(make, world_size, length=4, batch_size=batch_size, shuffle_buffer=16)
        steps = zip(*map(rows, found), strict=True)
        assert [list(itertools.chain(*step)) for step in steps] == alone
    steps = rows(make(length=32, batch_size=1, shuffle_buffer=16))  # accumulated over 8 micro-batches
    assert [list(itertools.chain(*steps[at : at + 8])) for at in range(0, 32, 8)] == alone


@pytest.mark.parametrize("batches", [{"batch_size": 2}, {"tokens_per_batch": 60}])
def test_a_rank_renders_only_what_it_trains_and_all_have_as_many_batches(make, write, batches, monkeypatch):
    long = {"prompt": "q", "completion": "k" * 200}  # in pieces, so that ranks make unlike numbers of batches
    write("train.jsonl", [long if number % 5 == 0 else pair for number, pair in enumerate(pairs(64))])
    rendered, render = Counter(), ChatRenderer.label

    def count(renderer, *arguments):
        rendered[threading.get_ident()] += 1
        return render(renderer, *arguments)

    monkeypatch.setattr(ChatRenderer, "label", count)
    found = run_ranks(make, 2, length=30, shuffle_buffer=32, too_long="split", **batches)
    assert [len(received) for received in found] == [30, 30]
    assert [number % 16 for number in rendered.values()] == [0, 0]  # half of each block
    numbers = [{row for row in flat(received) if row >= 0} for received in found]
    assert numbers[0].isdisjoint(numbers[1])
    fillers = [batch for received in found for batch in received if batch["row_ids"].tolist() == [-1]]
    assert all(set(batch["labels"].flatten().tolist()) == {-100} for batch in fillers)


def test_memory_does_not_grow_with_the_rows(make, write):
    write("long.jsonl", [{"prompt": f"q{number}", "completion": "k" * 400} for number in range(800)])
    used = {}
    tracemalloc.start()
    for batch in make("long.jsonl", length=32, batch_size=25, shuffle_buffer=100, max_length=500):
        used[int(batch["row_ids"].max()) // 100] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used[7] - used[2] < 2e5  # of 0.5 MB a block


# ---- rows that cannot be used ----------------------------------------------------------------------------------------

BAD = {"prompt": "q", "completion": ""}


def test_a_bad_row_stops_the_run_when_its_block_is_reached_or_is_skipped_and_counted(make, write, caplog):
    write("train.jsonl", [*pairs(12), BAD, *pairs(7)])
    walk = iter(make())
    assert sorted(flat(itertools.islice(walk, 4))) == list(range(8))
    with pytest.raises(UserError, match=r"^1 row cannot be used:\n  train.jsonl:13: the answer.*\n.*on_bad_row: skip"):
        next(walk)
    with caplog.at_level(logging.INFO, logger="qlora_lightning"):
        assert sorted(flat(make(length=8, skip_bad_rows=True))) == [row for row in range(16) if row != 12]
    assert "block 2 of the stream: train: 8 rows" in caplog.text
    assert "1 bad rows skipped: train.jsonl:13 (the answer" in caplog.text


def test_ranks_stop_together_at_a_row_that_only_one_of_them_renders(make, write):
    write("train.jsonl", [*pairs(12), BAD, *pairs(7)])
    words = run_ranks(make, 2, shuffle=False)  # blocks of 8 rows; row 12 is in rank 0's chunk of the second
    assert words[0].startswith("1 row cannot be used:\n  train.jsonl:13: the answer")
    assert words[1].startswith("another process stopped at a row of the stream")


def test_the_first_block_is_checked_beforehand_and_read_again(make, write, talk):
    loader = make()
    samples, report = loader.first_block()
    assert sorted(samples.row_ids.tolist()) == list(range(8))
    assert (report.rows, report.formats) == (8, ["prompt_completion"])
    assert rows(loader) == rows(make())
    write("train.jsonl", [*pairs(4), BAD])
    with pytest.raises(UserError, match=r"^1 row cannot be used"):
        make().first_block()
    samples, report = make(skip_bad_rows=True).first_block()
    assert (samples.row_ids.tolist(), report.rows, report.bad_rows) == ([0, 1, 2, 3], 5, 1)  # each looked at once
    write("train.jsonl", [BAD] * 3)
    with pytest.raises(UserError, match=r"train.jsonl:1: the answer \(message 2\) is empty"):
        next(iter(make(skip_bad_rows=True)))
    said, unsaid = ([*talk("q", "k")[:1], talk("q", "k")[1] | marks] for marks in ({}, {"train": False}))
    write("train.jsonl", [{"messages": unsaid}] + [{"messages": said}] * 15)
    with pytest.raises(UserError, match="1 of 8 rows of train leave nothing to train on"):
        make().first_block()
    write("train.jsonl", [{"messages": said}] * 15 + [{"messages": unsaid}])
    assert len(rows(make())) == 12  # a sorted file must not stop it on its way


def test_what_becomes_of_a_row_does_not_depend_on_where_the_run_begins(make, write):
    write("train.jsonl", [*pairs(9), {"text": "Four."}, *pairs(6)])  # a row of another shape, in the second block
    loader = make(skip_bad_rows=True, length=8)
    walk = iter(loader)
    first = rows(itertools.islice(walk, 4))
    state, rest = loader.state_dict(), rows(walk)
    again = make(skip_bad_rows=True, length=8)
    again.load_state_dict(state)
    assert rows(again) == rest
    assert sorted(row for batch in first + rest for row in batch) == [row for row in range(16) if row != 9]


def test_the_first_block_is_the_same_under_every_seed(make, shards):
    """A run that resumes under another seed compares its data by it."""
    assert len({make(shards, seed=seed).first_block()[0].content_hash for seed in range(4)}) == 1


# ---- in the data module ----------------------------------------------------------------------------------------------


@pytest.fixture
def module(write, characters):
    write("train.jsonl", pairs(26))
    write("val.jsonl", pairs(5))

    def module(trainer=True, **kwargs):
        files = {"train": "train.jsonl", "val": "val.jsonl", "tokenizer": characters}
        data = InstructionDataModule(**files | {"batch_size": 2, "streaming": True} | kwargs)
        if trainer:
            settings = {"max_steps": 5, "accumulate_grad_batches": 4, "overfit_batches": 0}
            data.trainer = SimpleNamespace(global_rank=0, world_size=1, **settings)
        return data

    return module


def test_a_stream_is_as_long_as_the_run(module):
    data = module()
    data.setup("fit")
    assert data.count_train_batches() == len(list(data.train_dataloader())) == 20
    assert (data.reports["train"].rows, len(data.samples["train"])) == (26, 26)  # each looked at once
    assert len(data.val_dataloader()) == 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("max_steps", -1, "a stream has no end, so trainer.max_steps must"), ("overfit_batches", 2, "trainer.overfit_b")],
)
def test_a_stream_without_an_end_or_that_repeats_is_refused_before_anything_is_read(module, name, value, words):
    data = module()
    setattr(data.trainer, name, value)
    with pytest.raises(UserError, match=f"data.streaming: {words}"):
        data.setup("fit")
    assert data.reports == {}


def test_without_a_trainer_a_stream_is_checked_but_not_run(module):
    data = module(trainer=False)
    data.setup("fit")
    assert data.reports["train"].rows == 26
    with pytest.raises(UserError, match=r"trainer.max_steps"):
        data.train_dataloader()
