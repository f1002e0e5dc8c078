"""Samples cut into pieces that can be read: characters stay whole, and each piece has its kinds."""

import io

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qlora_lightning.base.folder import load_tokenizer
from qlora_lightning.commands.inspection.report import print_row
from qlora_lightning.commands.inspection.rows import ShownRow, cut_into_pieces

STOP = 2  # <|im_end|>


@pytest.fixture(scope="module")
def smol(smollm2_folder):
    return load_tokenizer(str(smollm2_folder))


@pytest.fixture(scope="module")
def cut(smol):
    """Cut a prompt and an answer, of which the second is labelled."""

    def cut(prompt, answer=""):
        before, after = (smol.encode(text, add_special_tokens=False) for text in (prompt, answer))
        return cut_into_pieces([*before, *after], [False] * len(before) + [True] * len(after), smol, [STOP])

    return cut


def test_each_token_is_a_piece_with_its_kinds(cut):
    pieces = cut("<|im_start|>hi<|im_end|>", " you<|im_end|>\n")
    assert [piece.text for piece in pieces] == ["<|im_start|>", "hi", "<|im_end|>", " you", "<|im_end|>", "\n"]
    assert [piece.special for piece in pieces] == [True, False, True, False, True, False]
    assert [piece.labelled for piece in pieces] == [False, False, False, True, True, True]
    assert [piece.stop for piece in pieces] == [False, False, False, False, True, False]  # only if it is labelled


@pytest.mark.parametrize(
    "text", ["plain words, 3.50 €", "naïve café", "日本語の文章です。", "🦙👩🏽‍🚀🏳️‍🌈", "a\n\n  b\tc", "ℵ₀ ≠ ℵ₁"]
)
def test_characters_cut_over_several_tokens_stay_whole(cut, smol, text):
    pieces = cut("", text)
    assert "".join(piece.text for piece in pieces) == text
    assert [number for piece in pieces for number in piece.ids] == smol.encode(text, add_special_tokens=False)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)


def test_a_control_token_or_a_change_of_label_ends_a_character(smol):
    ids = smol.encode("🦙", add_special_tokens=False)
    assert len(cut_into_pieces(ids, [False] * len(ids), smol, [STOP])) == 1 < len(ids)
    assert cut_into_pieces([*ids[:-1], STOP], [False] * len(ids), smol, [STOP])[-1].ids == (STOP,)
    pieces = cut_into_pieces(ids, [True] + [False] * (len(ids) - 1), smol, [STOP])
    assert [piece.labelled for piece in pieces][:2] == [True, False]
    assert [number for piece in pieces for number in piece.ids] == ids


def test_a_space_that_the_decoder_drops_at_the_start_is_kept():
    words = Tokenizer(models.WordLevel({"▁Hello": 0, "▁big": 1, "gest": 2, "▁world": 3}, unk_token="gest"))
    words.decoder = decoders.Metaspace()  # as sentencepiece's
    pieces = cut_into_pieces(range(4), [False] * 4, PreTrainedTokenizerFast(tokenizer_object=words), [])
    assert [piece.text for piece in pieces] == ["Hello", " big", "gest", " world"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nhm</think>a", {"reasoning": "<think>\nhm</think>"}),
        ("a [THINK]hm[/THINK]b", {"reasoning": "[THINK]hm[/THINK]"}),
        ("<tool_call>f(1)</tool_call>", {"tool call": "<tool_call>f(1)</tool_call>"}),
        ("a\n<think>cut<|im_end|>next", {"reasoning": "<think>cut"}),  # to the end of its turn
        ("a<b>c</b></think>", {}),
    ],
)
def test_reasoning_and_tool_calls_are_parts_of_a_turn(cut, text, parts):
    found = {}
    for piece in cut(f"<|im_start|>q<|im_end|>{text}<|im_end|>"):
        if piece.part:
            found[piece.part] = found.get(piece.part, "") + piece.text
    assert {name: text.strip(" \n>") for name, text in found.items()} == {
        name: text.strip(" \n>") for name, text in parts.items()
    }


# ---- in the terminal -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(cut):
    def printed(prompt, answer="", width=80, **options):
        console = Console(file=io.StringIO(), width=width, highlight=False, **options)
        print_row(ShownRow("train.jsonl:1", "", cut(prompt, answer)), console)
        return console.file.getvalue().partition("train.jsonl:1")[2].partition("\n")[2]

    return printed


@pytest.mark.parametrize(
    ("prompt", "answer", "lines"),
    [
        ("<|im_start|>hi\n", "you<|im_end|>", ["  <|im_start|>│hi│↵", "  ⟦you│<|im_end|>■⟧"]),
        ("a\x1b[2Jb", "", ["  a│␛│[│2│J│b"]),
        ("hi", "", ["  hi"]),
    ],
)
@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "standard", "no_color": True}])
def test_tokens_are_parted_and_labelled_ones_in_brackets(printed, prompt, answer, lines, options):
    printed = printed(prompt, answer, **options)
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[2m"):
        printed = printed.replace(code, "")
    assert [line.rstrip() for line in printed.splitlines()] == lines


def test_a_long_row_is_broken_and_not_cut(printed):
    text = printed("x" * 50 + "日本語" * 20, width=30)
    assert max(map(len, text.splitlines())) <= 30
    assert text.count("日") == 20


def test_with_colour_labelled_is_green_and_parts_have_their_own(printed):
    text = printed(
        "<|im_start|><think>hm</think>", "a<tool_call>b<|im_end|>", force_terminal=True, color_system="standard"
    )
    for coloured in ("35m<|im_start|>", "1;35m<|im_end|>", "32ma", "33mb", "36mhm"):
        assert coloured in text
