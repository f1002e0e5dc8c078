"""Samples: the equal ones are named, rows are held out by content, and what is trained on has a hash."""

import pytest

from qlora_lightning import InstructionDataModule
from tests.data.conftest import prepare_rows
from tests.errors import rejects

A, B = ([1, 2, 3], [-100, 2, 3]), ([1, 2, 4], [-100, 2, 4])
A_LAST = ([1, 2, 3], [-100, -100, 3])  # the tokens of A, other labels


@pytest.fixture
def prepare(characters):
    """Prepare rows of token ids and labels, and others to validate on."""

    def prepare(*rows, val=(), **settings):
        train, val = ([{"input_ids": ids, "labels": labels} for ids, labels in part] for part in (rows, val))
        return prepare_rows(train, characters, val=val, **settings)

    return prepare


def test_duplicates_are_named_with_the_first_of_them(prepare):
    report = prepare(A, B, A, A_LAST, B, A).reports["train"]
    named = ["train:3 = train:1", "train:5 = train:2", "train:6 = train:1"]
    assert (report.duplicates, report.duplicate_pairs) == (3, named)
    report = prepare(*[A] * 30).reports["train"]
    assert (report.duplicates, len(report.duplicate_pairs)) == (29, 20)
    assert report.duplicate_pairs[-1] == "train:21 = train:1"
    # a row in pieces equals another if all its pieces do
    ids = list(range(10))
    long, beginning, other_end = (ids, ids), (ids[:8], ids[:8]), (ids, [*ids[:9], -100])
    report = prepare(long, beginning, other_end, long, max_length=8, too_long="split").reports["train"]
    assert report.duplicate_pairs == ["train:4 = train:1"]


def test_overlap_names_both_files(prepare):
    report = prepare(A, B, B, val=(A_LAST, B, ([7, 8], [-100, 8]), B)).reports["val"]
    assert (report.overlap, report.overlap_pairs) == (2, ["val:2 = train:2", "val:4 = train:2"])


# ---- held out --------------------------------------------------------------------------------------------------------

SIXTY = [([number % 40, 1], [-100, 1]) for number in range(60)]  # 20 contents occur twice


@pytest.fixture
def held(prepare, monkeypatch):
    """The numbers of rows that are trained and of those that are held out."""

    def held(rows, fraction, seed=1, **settings):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        samples = prepare(*rows, val_fraction=fraction, **settings).samples
        return samples["train"].row_ids.tolist(), samples["val"].row_ids.tolist()

    return held


def test_rows_are_held_out_by_content_and_seed(held):
    training, validation = held(SIXTY, 0.25)
    assert sorted(training + validation) == list(range(60))
    assert training == sorted(training)
    sides = [{number % 40 for number in side} for side in (training, validation)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 10  # the fraction is of contents
    # not by lines
    assert validation == [59 - number for number in held(SIXTY[::-1], 0.25)[1][::-1]]
    assert validation != held(SIXTY, 0.25, seed=2)[1]
    # rows that differ in labels only, and the pieces of a row, stay together
    twins = [([n // 2, 1, 2], [-100, 1 if n % 2 else -100, 2]) for n in range(60)]
    training, validation = held(twins, 0.3)
    assert {n // 2 for n in training}.isdisjoint(n // 2 for n in validation)
    # so do rows of tokens with one prompt, and a large group is not held out for its size
    prompts = [([n % 5, 1, n], [-100, -100, n]) for n in range(50)] + [([9, 9, n], [-100, -100, n]) for n in range(90)]
    training, validation = held(prompts, 0.2)
    assert {n % 5 for n in training if n < 50}.isdisjoint(n % 5 for n in validation if n < 50)
    assert 0 < len(validation) <= 28
    pieces = [([row] * 20, [row] * 20) for row in range(20)]
    training, validation = held(pieces, 0.25, max_length=8, too_long="split")
    assert set(training).isdisjoint(validation)
    assert len(validation) > len(set(validation)) == 5


@pytest.mark.parametrize("settings", [{}, {"train_on": "all"}, {"train_on": "last"}, {"max_length": 16}])
def test_a_prompt_is_trained_or_held_out_with_all_its_answers(characters, monkeypatch, settings):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    rows = [{"prompt": f"{'q' * 9}{n % 24}", "completion": "k" * (1 + n // 24)} for n in range(72)]
    data = prepare_rows(rows, characters, val_fraction=0.25, **settings)
    sides = [{row % 24 for row in data.samples[split].row_ids.tolist()} for split in ("train", "val")]
    assert (len(sides[1]), sides[0] & sides[1], data.reports["val"].rows) == (6, set(), 18)
    held = prepare_rows([{**row, "prompt": f"q{n}"} for n, row in enumerate(rows[:24])], characters, val_fraction=0.25)
    assert held.samples["val"].row_ids.tolist() == [3, 9, 13, 16, 18, 21]  # as runs that exist have them


def test_prompts_that_are_trained_with_another_answer_are_reported(characters):
    train, val = ([{"prompt": q, "completion": a} for q, a in part.split()] for part in ("ak bk ck", "ak bl dk"))
    report = prepare_rows(train, characters, val=val).reports["val"]
    assert (report.overlap, report.overlap_prompts) == (2, 1)
    line = "2 rows trained on too, 1 of them with another answer, so val_loss is too good: "
    assert f"{line}val:1 = train:1, val:2 = train:2 (prompt)" in report.describe()


def test_a_question_is_the_same_prompt_behind_the_system_prompt_of_the_settings(characters, tmp_path):
    (file := tmp_path / "rows.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "k"}}\n' for n in range(40)))
    with_system = {"path": str(file), "system": "s"}
    data = InstructionDataModule([str(file), with_system], val_fraction=0.1, tokenizer=characters)
    data.setup("fit")
    train, val = ({row % 40 for row in data.samples[split].row_ids.tolist()} for split in ("train", "val"))
    assert (len(val), train & val) == (4, set())
    data = InstructionDataModule(str(file), val=with_system, tokenizer=characters)
    data.setup("fit")
    assert data.reports["val"].overlap == 40


def test_each_side_has_a_row_or_the_split_is_rejected(held):
    assert [list(map(len, held(SIXTY[:2], fraction))) for fraction in (0.01, 0.99)] == [[1, 1], [1, 1]]
    with rejects("data.val_fraction"):
        held(SIXTY[:1], 0.5)


def test_whatever_is_trained_on_counts_in_the_hash(prepare):
    token, boundary = ([1, 2, 9], [-100, 2, 9]), [([1, 2], [-100, 2]), ([3, 1, 2, 4], [-100, -100, 2, 4])]
    others = [prepare(*rows).identity["train"] for rows in ((token, B), (A_LAST, B), (B, A), boundary)]
    assert prepare(A, B).identity["train"] not in others
