import pytest

from qlora_lightning.commands.inspection.arguments import Options
from qlora_lightning.commands.inspection.gather import PieceCutter, RowChooser
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.support.errors import UserError


def test_all_splits_are_reported_and_rows_come_from_the_first(inspection, data_module):
    found = inspection(data_module(val=["{v}<1}>"], train=["{one}<1}>", "{two}<2}>", "{3}<3}>"]))
    assert [split.name for split in found.splits] == ["train", "val"]
    assert found.rows_split == "train"
    assert [row.where for row in found.rows] == ["train.jsonl:1", "train.jsonl:2"]
    assert found.splits[0].lengths["max"] == 7
    assert found.splits[0].labels["max"] == 2
    assert found.splits[0].bars[0].samples == 1
    assert (found.epoch.batches, found.epoch.steps, found.batch_size) == (2, 2, 2)
    assert found.settings == "tokenizer letters · max_length 512"


def test_one_split_alone(inspection, data_module):
    found = inspection(data_module(val=["{v}<1}>"], train=["{one}<1}>"]), split="val")
    assert [split.name for split in found.splits] == ["val"]
    assert found.rows[0].where == "val.jsonl:1"
    assert found.epoch is None


@pytest.mark.parametrize(("split", "key"), [("test", r"data\.test"), (None, r"data\.train")])
def test_a_split_that_is_not_there_is_refused(inspection, data_module, split, key):
    data = data_module(train=["{one}<1}>"]) if split else data_module()
    with pytest.raises(UserError, match=f"no rows to inspect: {key} names no file"):
        inspection(data, split=split)


def test_ends_are_judged_over_all_splits(inspection, data_module):
    found = inspection(data_module(train=["{one}<1}>"], val=["{v}<1>"]))
    assert [well for well, _ in found.ends] == [False, True]
    assert "1 of 2 samples do not train one" in found.ends[0][1]


@pytest.fixture
def choose(sample_set, report, characters):
    """Choose from five samples of lines 1 to 7; line 3 is bad, line 5 gave none."""
    samples = sample_set("{one}<1}>", "{twenty}<22}>", "{Forty}<4}>", "{x}<6}>", "{seven}<7}>", lines=[1, 2, 4, 6, 7])
    what = report(rows=7, bad=[BadRow("train.jsonl:3", "not JSON")], bad_rows=1, dropped={"too long": 1})
    chooser = RowChooser("train", samples, what, PieceCutter(characters, [ord("}")]))
    return lambda **options: chooser.choose(Options(**options))


def test_the_first_two_when_none_are_asked_for(choose):
    assert [(row.where, row.tokens, row.labelled) for row in choose()] == [
        ("train.jsonl:1", 7, 2),
        ("train.jsonl:2", 11, 3),
    ]
    assert "".join(piece.text for piece in choose()[0].pieces) == "{one}1}"


@pytest.mark.parametrize("place", ["4", "train.jsonl:4"])
def test_a_row_by_its_line(choose, place):
    (row,) = choose(rows=(place,))
    assert "".join(piece.text for piece in row.pieces) == "{Forty}4}"


def test_rows_come_in_the_order_of_the_options(choose):
    rows = choose(rows=("7", "1"), longest=True, shortest=True)
    assert [(row.where, row.why) for row in rows] == [
        ("train.jsonl:7", ""),
        ("train.jsonl:1", ""),
        ("train.jsonl:2", "the longest"),
        ("train.jsonl:6", "the shortest"),
    ]


def test_a_bad_row_and_a_dropped_one_are_told(choose):
    bad, dropped = choose(rows=("3", "5"))
    assert (bad.where, bad.note) == ("train.jsonl:3", "a bad row: not JSON")
    assert (dropped.where, dropped.pieces) == ("train line 5", ())
    words = "no sample comes from here: no row begins in that line, or the row was dropped: too long (1)."
    assert dropped.note == words


def test_a_row_that_was_held_out_is_told_by_its_split(sample_set, report, characters):
    train, val = sample_set("a<b>", lines=[1]), sample_set("c<d>", lines=[2])
    other_file = sample_set("e<f>", "g<h>", "i<j>", lines=[2, 3, 4], file="test.jsonl")
    cutter = PieceCutter(characters, [])
    chooser = RowChooser("train", train, report(rows=3), cutter, {"val": val, "test": other_file})
    assert [row.note for row in chooser.choose(Options(rows=("2", "3")))] == [
        "is a row of val: --split val shows it.",
        "no sample comes from here: no row begins in that line.",
    ]


def test_a_bad_row_beyond_the_listed_ones_may_be_it(sample_set, report, characters):
    chooser = RowChooser("train", sample_set("a<b>"), report(rows=50, bad_rows=30), PieceCutter(characters, []))
    (row,) = chooser.choose(Options(rows=("40",)))
    assert row.note.endswith("or it is one of the bad rows that are not listed.")


@pytest.mark.parametrize("place", ["0", "-1", "x", "train.jsonl:", "1.5"])
def test_what_is_no_line_is_refused(choose, place):
    with pytest.raises(UserError, match="expected a line number from 1, or FILE:LINE"):
        choose(rows=(place,))


@pytest.mark.parametrize("place", ["8", "train.jsonl:8", "other.jsonl:1"])
def test_a_row_that_is_not_there_is_refused(choose, place):
    with pytest.raises(UserError, match=rf"--row {place}: train has no such row; its 7 rows end at 7"):
        choose(rows=(place,))


def test_all_pieces_of_a_split_row_are_shown(sample_set, report, characters):
    samples = sample_set("a<b>", "b<c>", "d<e>", lines=[1, 1, 2])
    chooser = RowChooser("train", samples, report(rows=2), PieceCutter(characters, []))
    assert [row.where for row in chooser.choose(Options(rows=("1",)))] == ["train.jsonl:1"] * 2


def test_a_search_ignores_case_and_counts(choose):
    note, *rows = choose(search="FORTY")
    assert note.note == "1 of 5 samples hold it."
    assert [row.where for row in rows] == ["train.jsonl:4"]
    note, *rows = choose(search="{")
    assert note.note == "5 of 5 samples hold it; the first 3 are shown."
    assert [row.where for row in rows] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:4"]
    (note,) = choose(search="nowhere")
    assert note.note == "0 of 5 samples hold it."


class DroppingTokenizer:
    """As sentencepiece's decoder: words begin with a space, which is dropped at the start of a text."""

    added_tokens_decoder, all_special_ids = {}, ()
    words = ("▁Hello", "▁big", "gest", "▁world")

    def decode(self, ids, **kwargs):
        return "".join(self.words[number] for number in ids).replace("▁", " ").removeprefix(" ")


def test_each_token_is_a_piece_with_its_kinds(characters):
    pieces = PieceCutter(characters, [ord("}")]).cut([ord(c) for c in "{a}b}c"], [False] * 3 + [True] * 2 + [False])
    assert [piece.text for piece in pieces] == ["{", "a", "}", "b", "}", "c"]
    assert [piece.special for piece in pieces] == [True, False, True, False, True, False]
    assert [piece.labelled for piece in pieces] == [False, False, False, True, True, False]
    assert [piece.stop for piece in pieces] == [False, False, False, False, True, False]  # only where it is labelled
    assert pieces[1].ids == (ord("a"),)
    assert PieceCutter(characters, []).cut([], []) == []


@pytest.mark.parametrize(
    "text",
    [
        "plain words, 3.50 €",
        "naïve café",
        "日本語の文章です。",
        "🦙👩🏽‍🚀🏳️‍🌈",
        "a\n\n  b\tc",
        "\N{REPLACEMENT CHARACTER}!",
        "ℵ₀ ≠ ℵ₁",
    ],
)
def test_characters_cut_over_several_tokens_stay_whole(smol, text):
    ids = smol.encode(text, add_special_tokens=False)
    pieces = PieceCutter(smol, [2]).cut(ids, [True] * len(ids))
    assert "".join(piece.text for piece in pieces) == text
    assert [number for piece in pieces for number in piece.ids] == ids
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{q}{<think>\nhm</think>a}", {"reasoning": "<think>\nhm</think>", "": "{q}{a}"}),
        ("{a [THINK]hm[/THINK]b}", {"reasoning": "[THINK]hm[/THINK]", "": "{a b}"}),
        ("{<tool_call>f(1)</tool_call>}", {"tool call": "<tool_call>f(1)</tool_call>", "": "{}"}),
        ("{a<think>cut}{next}", {"reasoning": "<think>cut", "": "{a}{next}"}),  # to the end of its turn
        ("{a<b>c</b></think>}", {"": "{a<b>c</b></think>}"}),
    ],
)
def test_reasoning_and_tool_calls_are_parts_of_a_turn(characters, text, parts):
    found = dict.fromkeys(parts, "")
    for piece in PieceCutter(characters, []).cut([ord(character) for character in text], [False] * len(text)):
        found[piece.part] += piece.text
    assert found == parts


def test_a_mark_may_be_a_control_token():
    class Marks:
        words = ("{", "<think>", "hm", "</think>", "a", "}")
        added_tokens_decoder, all_special_ids = {}, (0, 1, 3, 5)

        def decode(self, ids, **kwargs):
            return "".join(self.words[number] for number in ids)

    pieces = PieceCutter(Marks(), []).cut(range(6), [False] * 6)
    assert [piece.text for piece in pieces if piece.part] == ["<think>", "hm", "</think>"]


def test_a_llama_takes_more_than_one_token_and_is_one_piece(smol):
    ids = smol.encode("🦙", add_special_tokens=False)
    assert len(ids) > 1
    (piece,) = PieceCutter(smol, []).cut(ids, [False] * len(ids))
    assert (piece.text, piece.ids) == ("🦙", tuple(ids))


def test_a_character_that_never_ends_is_shown_as_what_it_is(smol):
    ids = smol.encode("🦙", add_special_tokens=False)
    unfinished = [*ids[:-1], 2]  # a control token ends the piece
    assert [piece.ids for piece in PieceCutter(smol, []).cut(unfinished, [False] * len(ids))][-1] == (2,)
    half = [True] + [False] * (len(ids) - 1)  # a change of label, too
    pieces = PieceCutter(smol, []).cut(ids, half)
    assert [piece.labelled for piece in pieces][:2] == [True, False]
    assert [number for piece in pieces for number in piece.ids] == ids


def test_a_space_that_the_decoder_drops_at_the_start_is_kept():
    pieces = PieceCutter(DroppingTokenizer(), []).cut([0, 1, 2, 3], [False] * 4)
    assert [piece.text for piece in pieces] == ["Hello", " big", "gest", " world"]
