from qlora_lightning.support.console import brief, describe, say


def test_a_line_is_printed_as_it_is(capsys):
    say("[bold]a/path[/bold] " + "x" * 200)
    assert capsys.readouterr().out == "[bold]a/path[/bold] " + "x" * 200 + "\n"


def test_what_a_run_says_of_itself_is_left_out_in_brief(capsys):
    describe("one")
    with brief():
        describe("two")
        say("three")
    describe("four")
    assert capsys.readouterr().out.splitlines() == ["one", "three", "four"]
