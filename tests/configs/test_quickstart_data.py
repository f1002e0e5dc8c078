"""The quickstart's data set: the committed files are what the generator writes, and they teach one clear task."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "configs" / "quickstart" / "make_data.py"
FILES = ("train.jsonl", "val.jsonl")

# Read off the committed files by eye: places before and after the time, and forms of the time.
EXPECTED = {
    "Don't let me forget my lunch with Ana at the Old Mill at midday next Friday.": (
        '{"title": "Lunch with Ana", "day": "next Friday", "time": "12:00", "place": "Old Mill"}'
    ),
    "Can you schedule an interview with Nina in the lobby on 2 June at 9:30 am?": (
        '{"title": "Interview with Nina", "day": "2 June", "time": "09:30", "place": "lobby"}'
    ),
    "Chat with Dr Patel on 9 March at 8 pm at the library": (
        '{"title": "Chat with Dr Patel", "day": "9 March", "time": "20:00", "place": "library"}'
    ),
}


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("quickstart_make_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def committed(name: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in SCRIPT.with_name(name).read_text(encoding="utf-8").splitlines()]
    assert all(list(row) == ["messages"] for row in rows)
    messages = [row["messages"] for row in rows]
    assert all([each["role"] for each in pair] == ["user", "assistant"] for pair in messages)
    assert all([each.keys() for each in pair] == [{"role", "content"}] * 2 for pair in messages)
    return [tuple(each["content"] for each in pair) for pair in messages]


def test_running_the_script_again_writes_the_committed_bytes(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path / "new")], check=True)
    for name in FILES:
        assert (tmp_path / "new" / name).read_bytes() == SCRIPT.with_name(name).read_bytes()


def test_rows_are_unique_and_no_validation_event_occurs_in_training():
    train, val = (committed(name) for name in FILES)
    assert (len(train), len(val)) == (600, 100)
    for rows in (train, val):
        assert len({sentence for sentence, _ in rows}) == len(rows)
    assert not {sentence for sentence, _ in train} & {sentence for sentence, _ in val}
    # An answer holds all slots (activity, person, day, time, place), so equal slots would mean equal answers, even
    # where the sentences differ in wording or in how they tell the time.
    assert not {answer for _, answer in train} & {answer for _, answer in val}


def test_a_quarter_of_the_validation_rows_has_wordings_that_training_lacks(generator):
    train, val = generator.build()
    trained = {row.wording for row in train}
    assert sum(row.wording not in trained for row in val) == 25
    assert trained == generator.TRAIN_WORDINGS.keys()
    assert {row.wording for row in val} == {*generator.TRAIN_WORDINGS, *generator.HELD_OUT_WORDINGS}


@pytest.mark.parametrize(("sentence", "answer"), EXPECTED.items())
def test_answers_that_were_checked_by_eye(sentence, answer):
    rows = dict(committed("train.jsonl") + committed("val.jsonl"))
    assert rows[sentence] == answer


@pytest.mark.parametrize("name", FILES)
def test_every_answer_is_derived_from_its_sentence(generator, name):
    place_names = {place for _, place in generator.PLACES}
    for sentence, answer in committed(name):
        event = json.loads(answer)
        assert list(event) == ["title", "day", "time", "place"]
        assert json.dumps(event) == answer  # one way of writing it, so that exact match means something
        activity, person = event["title"].split(" with ")
        assert activity[0].isupper()
        said = sentence.lower()  # a sentence may start with the activity or the day
        assert activity.lower() in said
        assert event["day"].lower() in said
        assert person in sentence
        assert not event["day"].startswith("on ")
        assert re.fullmatch(r"\d\d:\d\d", event["time"])
        assert [place for place in place_names if place in sentence] == [event["place"]] * bool(event["place"])
        assert not re.match(r"(at|in|the)\b", event["place"] or "")
