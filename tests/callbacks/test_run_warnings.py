import logging
import warnings

import pytest

from qlora_lightning.callbacks.run_warnings import RunWarnings


@pytest.fixture
def noted():
    found = RunWarnings()
    found.listen()
    yield found
    found.stop()


def test_warnings_of_python_and_of_loggers_are_counted_and_go_where_they_go(caplog):
    shown, found = [], RunWarnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *where: shown.append(str(message))
        found.listen()
        for _ in range(2):
            warnings.warn("slow", UserWarning, stacklevel=1)
        logging.getLogger("some.library").warning("%d rows", 3)
        logging.getLogger("some.library").info("nothing to see")
        found.note("Loss spike: 9")
        found.stop()
    assert found.counts == {"UserWarning: slow": 2, "3 rows": 1, "Loss spike: 9": 1}
    assert shown == ["slow", "slow"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == ["3 rows"]


def test_what_was_there_before_is_put_back():
    show, make = warnings.showwarning, logging.getLogRecordFactory()
    found = RunWarnings()
    found.listen()
    found.listen()
    found.stop()
    assert (warnings.showwarning, logging.getLogRecordFactory()) == (show, make)
    logging.getLogger("some.library").warning("late")
    assert found.counts == {}


def test_no_logger_gets_a_handler_which_would_silence_the_last_resort(noted):
    assert logging.getLogger("some.new.library").handlers == []
    assert not [handler for handler in logging.getLogger().handlers if "qlora" in type(handler).__module__]


def test_a_flood_of_different_warnings_ends(noted):
    for number in range(200):
        noted.note(f"step {number}")
    noted.note("step 5")
    noted.note("x" * 10_000)
    assert len(noted.counts) == 100
    assert noted.counts["step 5"] == 2


def test_a_message_that_cannot_be_formatted_is_noted_as_it_is(noted):
    logging.getLogRecordFactory()("some.library", logging.WARNING, "f", 1, "%d rows", ("x",), None)
    assert noted.counts == {"%d rows": 1}
