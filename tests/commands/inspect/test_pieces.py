import pytest

from qlora_lightning.commands.inspect.pieces import PieceCutter


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
