import io

import pytest
from rich.console import Console

from qlora_lightning.commands.inspect.terminal import print_inspection
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
