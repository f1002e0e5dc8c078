import pytest

from qlora_lightning.cli import COMMANDS, main
from qlora_lightning.commands.option_parser import OptionParser
from qlora_lightning.support.errors import UserError

_BY_JSONARGPARSE = ("fit", "validate", "test", "predict")


def test_a_mistake_is_a_sentence_that_names_the_help():
    parser = OptionParser("do", "Does it.", "")
    parser.add_argument("--times", type=int)
    with pytest.raises(UserError, match=r"argument --times: invalid int value: 'x'\. See `qlora-lightning do --help`"):
        parser.parse_args(["--times", "x"])


def test_paragraphs_fill_the_terminal_and_examples_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "42")
    examples, usage = "examples:\n  do --this and --that", "qlora-lightning do [--this [NAME=]THIS] [--that THAT]"
    parser = OptionParser("do", "One two three four five\nsix seven eight nine ten.", examples, usage)
    shown = parser.format_help()
    assert shown.startswith("usage: qlora-lightning do\n       [--this [NAME=]THIS]\n       [--that THAT]\n\n")
    assert "\nOne two three four five six seven eight\nnine ten.\n" in shown
    assert "\nexamples:\n  do --this and --that\n" in shown


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in _BY_JSONARGPARSE])
def test_the_help_of_every_command_fits_80_columns_but_for_its_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > 80]
    assert all(line.startswith("  qlora-lightning ") for line in wide)
