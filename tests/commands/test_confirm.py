import sys

import pytest

from qlora_lightning.commands.confirm import confirm
from qlora_lightning.support.errors import UserError


@pytest.mark.parametrize(("answer", "meant"), [("y", True), (" YES ", True), ("", False), ("n", False), ("yep", False)])
def test_only_a_yes_is_one(answer, meant, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert confirm("Sure?", "This") is meant


def test_the_end_of_input_is_a_no(monkeypatch):
    def end(question):
        raise EOFError

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", end)
    assert confirm("Sure?", "This") is False


def test_without_a_terminal_it_is_refused(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match=r"^This asks for a yes, and there is no terminal to ask on\. Add --yes\.$"):
        confirm("Sure?", "This")
