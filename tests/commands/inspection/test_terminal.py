import io

import pytest
from rich.console import Console

from qlora_lightning.commands.inspection.gather import PieceCutter
from qlora_lightning.commands.inspection.terminal import RowWriter, print_inspection
from qlora_lightning.data.rows.bad_rows import BadRow


@pytest.fixture
def printed(inspection):
    def printed(*arguments, width=80, **options):
        console = Console(file=io.StringIO(), width=width, highlight=False)
        print_inspection(inspection(*arguments, **options), console)
        return console.file.getvalue()

    return printed


def test_the_whole_report(printed):
    lines = [line.rstrip() for line in printed(trainer={"max_epochs": 3}).splitlines()]
    assert (
        lines
        == """c.yaml
tokenizer letters · max_length 512

                    train
shapes found       alpaca
rows read               3
bad rows                0
dropped                 0
samples                 3
tokens                 23
labelled tokens         6
labelled share      26.1%
samples shortened       0
duplicates              0

Tokens per sample
                  min    5 %   25 %   50 %   75 %   95 %   99 %    max
train tokens        7      7      7      7      9      9      9      9
train labelled      2      2      2      2      2      2      2      2

train: tokens per sample
  7  ████████████████████████████████████████  2
  8                                            0
  9  ████████████████████                      1

An epoch of train
  batches per epoch  2 of 2 rows
  tokens per batch   12 on average, 14 at most
  tokens per epoch   23, no padding
  optimizer steps    2 per epoch; 6 in all (3 epochs)

✓ Stop token } (125): every sample trains one.
✓ BOS: this tokenizer has none.

Rows of train as the model sees them
⟦labelled tokens⟧ · ■ stop token · │ between tokens · ↵ newline

train.jsonl:1  7 tokens, 2 labelled
  {│o│n│e│}⟦1│}■⟧

train.jsonl:2  7 tokens, 2 labelled
  {│t│w│o│}⟦2│}■⟧""".splitlines()
    )


def test_four_splits_of_large_numbers_fit_80_columns(printed, data_module):
    large = {"rows": 123_456_789, "tokens": 98_765_432_109, "labelled": 9_876_543_210, "formats": ["prompt_completion"]}
    splits = ("train", "val", "test", "predict")
    text = printed(data_module(reports=dict.fromkeys(splits, large), **{split: ["{q}<a}>" * 9] for split in splits}))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("98,765,432,109") == 4


def test_faults_are_listed_and_nothing_in_them_acts_on_the_terminal(printed, data_module):
    bad = {"bad": [BadRow("train.jsonl:2", "found '\x1b[2J[bold]'" + "x" * 90)], "bad_rows": 1}
    text = printed(data_module(reports={"train": bad}, train=["{q}<a}>"]))
    assert "train: 1 bad row\n  train.jsonl:2: found" in text
    assert "'␛[2J[bold]'" in text
    assert "\x1b" not in text
    assert "x" * 90 in text.replace("\n  ", "")  # folded, not cut


def test_a_row_without_a_sample_is_a_sentence(printed, data_module):
    data = data_module(reports={"train": {"rows": 4, "dropped": {"too long": 1}}}, train=["{q}<a}>"])
    assert "train line 3  no sample comes from here: no row begins in that line" in printed(data, rows=("3",))


def test_a_bar_that_is_not_empty_is_seen(printed, data_module):
    data = data_module(train=["{q}<a}>"] * 2000 + ["{qq}<a}>"])
    assert any(line.split() == ["6", "▏", "1"] for line in printed(data).splitlines())


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


def test_reasoning_and_calls_have_colours_of_their_own_labelled_or_not(write):
    colours = {"force_terminal": True, "color_system": "standard", "no_color": False}
    printed, _ = write("{[think]q}<a[tool_call]b}>", **colours)
    assert "\x1b[2;36mq\x1b[0m" in printed or "\x1b[1;2;36mq\x1b[0m" in printed
    assert "\x1b[33mb\x1b[0m" in printed or "\x1b[1;33mb\x1b[0m" in printed


def test_lines_break_between_tokens_and_at_newlines(write):
    printed, _ = write("abcdefgh\n\nxy", width=10)
    assert printed.splitlines() == ["  a│b│c│d", "  │e│f│g│h", "  │↵", "  │↵", "  │x│y"]


def test_what_would_act_on_the_terminal_is_shown(write):
    assert write("a\x1b[2Jb\0")[0] == "  a│␛│[│2│J│b│␀\n"


def test_wide_characters_take_two_columns(write):
    assert write("日本語文", width=10)[0].splitlines() == ["  日│本│語", "  │文"]
