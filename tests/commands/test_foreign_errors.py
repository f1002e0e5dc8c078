import pytest
from lightning import Trainer

from qlora_lightning.commands.foreign_errors import word_foreign_error
from qlora_lightning.support.errors import UserError


def catch(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_our_own_sentence_is_found_inside_what_wraps_it():
    said = UserError("model.rank is 0")

    def wrapped():
        raise ValueError("Does not validate against any of the Union subtypes") from said

    assert word_foreign_error(catch(wrapped)) is said


def test_a_logger_without_its_package_is_one_sentence():
    text = (
        "Does not validate against any of the Union subtypes\nSubtypes: [Logger, bool]\nErrors:\n"
        "  - Problem with given class_path 'lightning.pytorch.loggers.X':\n      Requirement 'x>=1' not met.\n"
        "  - Expected a <class 'bool'>\n"
        "Given value: Namespace(class_path='lightning.pytorch.loggers.X', init_args=None)"
    )
    said = word_foreign_error(ValueError(text))
    assert str(said) == "lightning.pytorch.loggers.X could not be made: Requirement 'x>=1' not met."
    assert word_foreign_error(ValueError(text.replace("lightning.pytorch.loggers.X", "mine.X"))) is None


def test_what_lightning_refuses_is_one_sentence():
    error = catch(lambda: Trainer(max_steps=-5, accelerator="cpu"))
    assert str(word_foreign_error(error)).startswith("trainer: ")


@pytest.mark.parametrize(
    ("raises", "words"),
    [
        (lambda: b"\xff".decode("utf-8"), "not text in UTF-8: invalid start byte at byte 0"),
        (lambda: int("PL_GLOBAL_SEED"), "PL_GLOBAL_SEED is None: expected an integer"),
    ],
)
def test_files_and_seeds_that_are_none(raises, words, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert words in str(word_foreign_error(catch(raises)))


def test_a_fault_of_the_program_stays_what_it_is():
    assert word_foreign_error(catch(lambda: int("x"))) is None
