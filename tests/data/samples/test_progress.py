import pytest

from qlora_lightning.data import prepare
from qlora_lightning.data.prepare import rows_bar


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal


def watch_twice(**kwargs):
    with rows_bar("train", **kwargs) as watch:
        watch(512)
        watch(7_473)


def test_few_rows_are_prepared_without_a_word(capsys):
    watch_twice()
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_shows_a_bar_on_standard_error(capsys, monkeypatch):
    monkeypatch.setattr(prepare, "_PATIENCE", -1)
    watch_twice()
    out, err = capsys.readouterr()
    assert out == ""
    assert "train" in err
    assert "7,473 rows" in err


def test_only_one_of_several_processes_shows_it(capsys, monkeypatch):
    monkeypatch.setattr(prepare, "_PATIENCE", -1)
    watch_twice(show=False)
    assert capsys.readouterr() == ("", "")
