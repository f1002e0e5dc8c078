"""The report in the terminal and as a page: the same figures, and nothing in a row acts on either."""

import io

import pytest
from rich.console import Console

from qlora_lightning.commands.inspection.page import render_page
from qlora_lightning.commands.inspection.rows import PieceCutter
from qlora_lightning.commands.inspection.terminal import RowWriter, print_inspection
from qlora_lightning.data.rows.bad_rows import BadRow
from tests.commands.inspection.conftest import cut_text
from tests.markup import Reader

HOSTILE = "</p><script>alert('1')</script>&amp;\" onmouseover=\"x"
PLAIN = """c.yaml
tokenizer letters · max_length 512 · too_long truncate · train_on assistant

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
  {│t│w│o│}⟦2│}■⟧
"""


def printed(inspection):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_inspection(inspection, console)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def test_the_whole_report(inspection):
    assert printed(inspection(trainer={"max_epochs": 3})) == PLAIN


def test_four_splits_of_large_numbers_fit_80_columns(inspection):
    large = {"rows": 123_456_789, "tokens": 98_765_432_109, "labelled": 9_876_543_210, "formats": ["prompt_completion"]}
    splits = ("train", "val", "test", "predict")
    text = printed(inspection(dict.fromkeys(splits, large), **{split: ["{q}<a}>" * 9] for split in splits}))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("98,765,432,109") == 4


def test_nothing_in_a_fault_acts_on_the_terminal_or_is_cut(inspection):
    bad = {"bad": [BadRow("train.jsonl:2", "found '\x1b[2J[bold]'" + "x" * 90)], "bad_rows": 1}
    text = printed(inspection({"train": bad}, train=["{q}<a}>"]))
    assert "train: 1 bad row\n  train.jsonl:2: found" in text
    assert "'␛[2J[bold]'" in text
    assert "\x1b" not in text
    assert "x" * 90 in text.replace("\n  ", "")


def test_a_bar_that_is_not_empty_is_seen(inspection):
    text = printed(inspection(train=["{q}<a}>"] * 2000 + ["{qq}<a}>"]))
    assert any(line.split() == ["6", "▏", "1"] for line in text.splitlines())


# ---- rows in the terminal --------------------------------------------------------------------------------------------

COLOURS = {"force_terminal": True, "color_system": "standard", "no_color": False}


@pytest.fixture
def write(characters):
    def write(text, width=80, **options):
        pieces = PieceCutter(characters, [ord("}")]).cut(*cut_text(text))
        console = Console(file=io.StringIO(), width=width, **options)
        for line in RowWriter(console).lines(pieces):
            console.print(line, soft_wrap=True)
        return console.file.getvalue()

    return write


@pytest.mark.parametrize(
    ("text", "options", "lines"),
    [
        ("{q}<ab}>\nc", {}, ["  {│q│}⟦a│b│}■⟧↵", "  │c"]),
        ("q<a}>", {}, ["  q⟦a│}■⟧"]),
        ("q<a}>", {**COLOURS, "no_color": True}, ["  q⟦a│}■⟧"]),
        ("abcdefgh\n\nxy", {"width": 10}, ["  a│b│c│d", "  │e│f│g│h", "  │↵", "  │↵", "  │x│y"]),
        ("a\x1b[2Jb\0", {}, ["  a│␛│[│2│J│b│␀"]),
        ("日本語文", {"width": 10}, ["  日│本│語", "  │文"]),  # two columns each
    ],
)
def test_without_colour_tokens_are_parted_and_labelled_ones_in_brackets(write, text, options, lines):
    assert write(text, **options).splitlines() == lines


def test_with_colour_labelled_is_green_and_the_stop_token_red_and_parts_have_their_own(write):
    text = write("{[think]q}<a[tool_call]b}>", **COLOURS)
    for colour in ("35m{", "32ma", "33mb", "1;37;41m}"):
        assert f"{colour}\x1b[0m" in text
    assert "\x1b[2;36mq\x1b[0m" in text or "\x1b[1;2;36mq\x1b[0m" in text
    assert "⟦" not in text


# ---- the page --------------------------------------------------------------------------------------------------------


def tokens(page):
    """The text, classes and description of each token of a page."""
    spans = [(data, attributes) for tag, attributes, data in page.data if tag == "span" and "data-about" in attributes]
    return [(data, attributes["class"], attributes["data-about"]) for data, attributes in spans]


def test_tokens_of_the_page_have_their_kinds_and_ids(inspection):
    found = Reader(render_page(inspection(train=["{q\n}<[think]h[/think]a}>"])))
    kinds = {text: (classes, about) for text, classes, about in tokens(found)}
    assert kinds["↵\n"] == ("t", "id 10")
    assert kinds["{"] == ("t sp", "id 123 · special")
    assert kinds["a"] == ("t la", "id 97 · labelled")
    assert tokens(found)[-1] == ("}", "t la sp st", "id 125 · labelled · special · stop")
    assert ("h", "t la re", "id 104 · labelled · reasoning") in tokens(found)


def test_whatever_rows_hold_is_text_and_the_page_needs_nothing_beside_itself(inspection):
    bad = {"bad": [BadRow("train.jsonl:9", HOSTILE)], "bad_rows": 1, "formats": [HOSTILE]}
    row = f"{{q}}<{HOSTILE.replace('>', '')}\0>"
    html = render_page(inspection({"train": bad}, asked={"search": HOSTILE}, train=[row]))
    found = Reader(html)
    assert not {"script", "img", "a", "iframe"} & {tag for tag, _ in found.elements}
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert f"train.jsonl:9: {HOSTILE}" in found.text
    assert "\0" not in found.text
    for reference in ("http:", "https:", "src=", "href=", "url(", "@import", "@font-face"):
        assert reference not in html
    policy = [a["content"] for tag, a in found.elements if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_holds_the_figures_and_a_drawing_a_split(inspection):
    overlap = {"overlap": 1, "overlap_pairs": [("val.jsonl:1", "train.jsonl:1")]}
    texts = {"train": ["{one}<1}>", "{three}<3}>"], "val": ["{one}<1}>"]}
    found = Reader(render_page(inspection({"val": overlap}, **texts)))
    heights = [float(attributes["height"]) for tag, attributes in found.elements if tag == "rect"]
    assert heights == [180.0, 0.0, 180.0, 180.0]  # lengths 7, 8 and 9 of train; 7 of val
    for part in ("val.jsonl:1 = train.jsonl:1", "16, no padding", "every sample trains one", "25.0%"):
        assert part in found.text


def test_a_page_of_predict_rows_has_no_labels(inspection):
    text = Reader(render_page(inspection(predict=["{q}", "{r}"]))).text
    assert "predict tokens" in text
    assert "predict labelled" not in text
    assert "An epoch" not in text
