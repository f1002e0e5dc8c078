"""The quickstart's data set: the committed files are what the generator writes, and they teach one clear task."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "configs" / "quickstart" / "make_data.py"
FILES = ("train.jsonl", "val.jsonl")

# Read off the committed files by eye: every form of the time, a sentence that starts with the day, one that starts
# with the person, places before and after the time, and events without a place.
EXPECTED = {
    "On 9 March I'm having brunch with Hugo at half past eleven in the morning.": (
        '{"title": "Brunch with Hugo", "day": "9 March", "time": "11:30", "place": null}'
    ),
    "Let's plan breakfast with Aunt Rosa next Saturday at half past ten in the morning at Luigi's.": (
        '{"title": "Breakfast with Aunt Rosa", "day": "next Saturday", "time": "10:30", "place": "Luigi\'s"}'
    ),
    "Don't let me forget my lunch with Ana at the Old Mill at midday next Friday.": (
        '{"title": "Lunch with Ana", "day": "next Friday", "time": "12:00", "place": "Old Mill"}'
    ),
    "I have a chat with Mia next Saturday at noon.": (
        '{"title": "Chat with Mia", "day": "next Saturday", "time": "12:00", "place": null}'
    ),
    "Can you schedule an interview with Nina in the lobby on 2 June at 9:30 am?": (
        '{"title": "Interview with Nina", "day": "2 June", "time": "09:30", "place": "lobby"}'
    ),
    "Remind me about my planning session with Lucy on 2 June at half past three in the afternoon at the museum.": (
        '{"title": "Planning session with Lucy", "day": "2 June", "time": "15:30", "place": "museum"}'
    ),
    "Chat with Dr Patel on 9 March at 8 pm at the library": (
        '{"title": "Chat with Dr Patel", "day": "9 March", "time": "20:00", "place": "library"}'
    ),
    "Uncle Ben invited me to dinner on 14 May at 18:45 in the lobby.": (
        '{"title": "Dinner with Uncle Ben", "day": "14 May", "time": "18:45", "place": "lobby"}'
    ),
}

# Counted once with SmolLM2's tokenizer: the chat template with its default system prompt takes 32 tokens, and the two
# messages take at most 9 more than they have words, digits and runs of punctuation. The true figures were 96 tokens
# for the longest row and 85 on average.
TEMPLATE_TOKENS = 32
TOKENS_ABOVE_PIECES = 9
PIECE = re.compile(r"\d|[^\W\d]+|[^\w\s]+")


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("quickstart_make_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def committed(name: str) -> list[tuple[str, str]]:
    """Returns the (sentence, answer) pairs of a committed file."""
    rows = [json.loads(line) for line in SCRIPT.with_name(name).read_text(encoding="utf-8").splitlines()]
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def run_script(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_running_the_script_again_writes_the_committed_bytes(tmp_path):
    run_script("--out", str(tmp_path / "new"))
    for name in FILES:
        assert (tmp_path / "new" / name).read_bytes() == SCRIPT.with_name(name).read_bytes()


def test_another_seed_writes_other_rows(tmp_path):
    run_script("--out", str(tmp_path), "--seed", "7")
    for name in FILES:
        assert (tmp_path / name).read_bytes() != SCRIPT.with_name(name).read_bytes()


def test_help_names_the_options():
    text = run_script("--help")
    assert "--out DIR" in text
    assert "--seed N" in text


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 600), ("val.jsonl", 100)])
def test_every_line_is_one_user_and_one_assistant_message(name, count):
    lines = SCRIPT.with_name(name).read_text(encoding="utf-8").splitlines()
    assert len(lines) == count
    for line in lines:
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [list(message) for message in row["messages"]] == [["role", "content"]] * 2
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_rows_are_unique_and_no_validation_event_occurs_in_training():
    train, val = (committed(name) for name in FILES)
    for rows in (train, val):
        assert len({sentence for sentence, _ in rows}) == len(rows)
    assert not {sentence for sentence, _ in train} & {sentence for sentence, _ in val}
    # An answer holds all slots (activity, person, day, time, place), so equal slots would mean equal answers, even
    # where the sentences differ in wording or in how they tell the time.
    assert not {answer for _, answer in train} & {answer for _, answer in val}


def test_a_quarter_of_the_validation_rows_has_wordings_that_training_lacks(generator):
    train, val = generator.build()
    for name, rows in zip(FILES, (train, val), strict=True):
        # The rows name their wordings; first make sure that they are the rows of the committed file.
        assert [(row.sentence, row.answer) for row in rows] == committed(name)
    trained = {row.wording for row in train}
    assert sum(row.wording not in trained for row in val) == 25
    assert trained == generator.TRAIN_WORDINGS.keys()
    assert {row.wording for row in val} == {*generator.TRAIN_WORDINGS, *generator.HELD_OUT_WORDINGS}


def test_wordings_are_many_different_and_equally_frequent(generator):
    templates = [*generator.TRAIN_WORDINGS.values(), *generator.HELD_OUT_WORDINGS.values()]
    assert len(set(templates)) == len(templates)
    frequencies = Counter(row.wording for row in generator.build()[0])
    assert len(frequencies) >= 12
    assert set(frequencies.values()) == {600 // len(frequencies)}


def test_training_tells_every_time_in_every_form(generator):
    sentences = [sentence for sentence, _ in committed("train.jsonl")]
    for phrase, _ in generator.TIMES:
        # The phrase's first digit must not be the end of a longer number.
        assert any(re.search(rf"(?<![\d:]){phrase}\b", sentence) for sentence in sentences), phrase


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


@pytest.mark.parametrize("name", FILES)
def test_some_sentences_name_no_place_and_most_do(name):
    without = [json.loads(answer)["place"] is None for _, answer in committed(name)]
    assert 0.1 < sum(without) / len(without) < 0.3


@pytest.mark.parametrize("name", FILES)
def test_rows_are_short(name):
    pieces = [len(PIECE.findall(sentence)) + len(PIECE.findall(answer)) for sentence, answer in committed(name)]
    bounds = [TEMPLATE_TOKENS + TOKENS_ABOVE_PIECES + count for count in pieces]
    assert max(bounds) <= 110
    assert sum(bounds) / len(bounds) <= 100
