import io

import pytest
from rich.console import Console

from qlora_lightning.commands.inspect.pieces import PieceCutter
from qlora_lightning.commands.inspect.row_text import RowWriter


@pytest.fixture
def write(characters):
    """Lay a text out, what stands between < and > labelled; gives what is printed."""

    def write(text, **options):
        prompt, _, answer = text.partition("<")
        answer, _, end = answer.partition(">")
        labelled = [False] * len(prompt) + [True] * len(answer) + [False] * len(end)
        pieces = PieceCutter(characters, [ord("}")]).cut([ord(c) for c in prompt + answer + end], labelled)
        console = Console(file=io.StringIO(), width=options.pop("width", 80), **options)
        writer = RowWriter(console)
        for line in writer.lines(pieces):
            console.print(line, soft_wrap=True)
        return console.file.getvalue(), writer.legend()

    return write


def test_without_colour_labelled_tokens_stand_in_brackets(write):
    printed, legend = write("{q}<ab}>\nc")
    assert printed == "  {│q│}⟦a│b│}■⟧↵\n  │c\n"
    assert legend.plain == "⟦labelled tokens⟧ · ■ stop token · │ between tokens · ↵ newline"


def test_a_sample_that_ends_labelled_closes_its_bracket(write):
    assert write("q<a}>")[0] == "  q⟦a│}■⟧\n"


def test_no_color_counts_as_no_colour(write):
    assert write("q<a}>", force_terminal=True, color_system="truecolor", no_color=True)[0] == "  q⟦a│}■⟧\n"


def test_with_colour_labelled_is_green_and_the_stop_token_red(write):
    printed, legend = write("{q}<ab}>", force_terminal=True, color_system="standard", no_color=False)
    assert "⟦" not in printed + legend.plain
    assert "\x1b[35m{\x1b[0m" in printed
    assert "\x1b[32ma\x1b[0m\x1b[1;32mb\x1b[0m" in printed or "\x1b[1;32ma\x1b[0m\x1b[32mb\x1b[0m" in printed
    assert "\x1b[1;37;41m}\x1b[0m" in printed


def test_lines_break_between_tokens_and_at_newlines(write):
    printed, _ = write("abcdefgh\n\nxy", width=10)
    assert printed.splitlines() == ["  a│b│c│d", "  │e│f│g│h", "  │↵", "  │↵", "  │x│y"]


def test_what_would_act_on_the_terminal_is_shown(write):
    assert write("a\x1b[2Jb\0")[0] == "  a│␛│[│2│J│b│␀\n"


def test_wide_characters_take_two_columns(write):
    assert write("日本語文", width=10)[0].splitlines() == ["  日│本│語", "  │文"]
