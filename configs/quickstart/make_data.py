"""Writes the quickstart's data set: a sentence goes in, a calendar event comes out as JSON.

    Lunch with Ana next Friday at noon in the Blue Room
    {"title": "Lunch with Ana", "day": "next Friday", "time": "12:00", "place": "Blue Room"}

The four keys always come in this order, under rules that leave one right answer per sentence:

* ``title``: the activity without its article, a capital first, then "with" and the person.
* ``day``: as said, without "on".
* ``time``: the 24-hour clock, whatever the sentence calls it.
* ``place``: as said, without its preposition and "the"; ``null`` if the sentence names none.

Running it again writes the very same bytes, so the committed files can be checked against it.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SEED = 2024
TRAIN_ROWS = 600
VAL_ROWS = 100
HELD_OUT_ROWS = VAL_ROWS // 4  # validation rows in wordings that training never uses
NO_PLACE_SHARE = 0.2

# A wording becomes a sentence by filling its slots and raising its first letter. `place` brings its own leading
# space, so that a sentence without a place has no gap.
TRAIN_WORDINGS = {
    "bare": "{activity} with {person} {day} at {time}{place}",
    "bare-place-first": "{activity} with {person} {day}{place} at {time}",
    "have": "I have {an_activity} with {person} {day} at {time}{place}.",
    "calendar": "Please put {an_activity} with {person} in my calendar {day} at {time}{place}.",
    "remind": "Remind me about my {activity} with {person} {day} at {time}{place}.",
    "day-first": "{day} at {time}: {activity} with {person}{place}.",
    "schedule": "Can you schedule {an_activity} with {person}{place} {day} at {time}?",
    "and-i": "{person} and I are having {an_activity} {day} at {time}{place}.",
    "meeting-for": "I am meeting {person} for {an_activity} {day} at {time}{place}.",
    "time-first": "At {time} {day} I have {an_activity} with {person}{place}.",
    "forget": "Don't let me forget my {activity} with {person}{place} at {time} {day}.",
    "book": "Book {an_activity} with {person} for {day_name} at {time}{place}.",
    "list": "Add to my calendar: {activity} with {person}, {day_name}, {time}{place}.",
    "see": "{day} I will see {person} for {an_activity} at {time}{place}.",
    "invited": "{person} invited me to {an_activity} {day} at {time}{place}.",
}
HELD_OUT_WORDINGS = {
    "plan": "Let's plan {an_activity} with {person} {day} at {time}{place}.",
    "having": "{day} I'm having {an_activity} with {person} at {time}{place}.",
    "save": "Save the date: {activity} with {person} {day}{place} at {time}.",
    "promised": "I promised {person} {an_activity} {day} at {time}{place}.",
    "note": "Could you note that {person} and I have {an_activity} {day} at {time}{place}?",
}

# Article, name, and the hours between which it makes sense: nobody has dinner at 8 am.
ACTIVITIES = (
    ("", "breakfast", "08:00", "10:30"),
    ("", "brunch", "10:00", "12:30"),
    ("", "lunch", "11:30", "14:00"),
    ("", "coffee", "08:00", "17:30"),
    ("", "dinner", "17:30", "20:30"),
    ("a ", "budget review", "08:00", "18:00"),
    ("a ", "design review", "08:00", "18:00"),
    ("a ", "planning session", "08:00", "18:00"),
    ("a ", "training session", "08:00", "20:30"),
    ("a ", "study session", "08:00", "20:30"),
    ("a ", "chess game", "10:00", "20:30"),
    ("a ", "language lesson", "08:00", "20:30"),
    ("a ", "photo shoot", "08:00", "20:30"),
    ("a ", "rehearsal", "10:00", "20:30"),
    ("a ", "chat", "08:00", "20:30"),
    ("an ", "interview", "08:00", "18:00"),
)

PEOPLE = (
    *("Ana", "Omar", "Leo", "Mia", "Noah", "Priya", "Sam", "Tom", "Zoe", "Ivan", "Lucy", "Hugo"),
    *("Emma", "Felix", "Nina", "Paul", "Sara", "Yuki", "Dr Patel", "Dr Stone", "Aunt Rosa", "Uncle Ben"),
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# What the sentence says, and what the answer says.
DAYS = (
    ("today", "today"),
    ("tomorrow", "tomorrow"),
    *((f"on {day}", day) for day in WEEKDAYS),
    *((f"next {day}", f"next {day}") for day in WEEKDAYS),
    *((f"this {day}", f"this {day}") for day in WEEKDAYS[4:]),
    *((f"on {date}", date) for date in ("14 May", "2 June", "21 July", "9 March", "30 October")),
)

# Few hours, each in several forms and far from the others on the 24-hour clock: telling the time is the part that a
# model of 135M parameters finds hard, and 600 rows did not teach it every hour from 8 am to 8 pm.
TIMES = (
    *(("noon", "12:00"), ("midday", "12:00")),
    *(("9 am", "09:00"), ("9:30 am", "09:30")),
    ("half past ten in the morning", "10:30"),
    *(("11 am", "11:00"), ("11:30 am", "11:30"), ("half past eleven in the morning", "11:30")),
    *(("3 pm", "15:00"), ("3:30 pm", "15:30"), ("half past three in the afternoon", "15:30")),
    *(("8 pm", "20:00"), ("8:30 pm", "20:30"), ("half past eight in the evening", "20:30")),
    *(("08:15", "08:15"), ("10:45", "10:45"), ("13:45", "13:45"), ("16:15", "16:15"), ("18:45", "18:45")),
)

PLACES = (
    ("in the Blue Room", "Blue Room"),
    ("in Room 12", "Room 12"),
    ("in the garden", "garden"),
    ("in the lobby", "lobby"),
    ("in the conference room", "conference room"),
    ("in City Park", "City Park"),
    ("at Cafe Roma", "Cafe Roma"),
    ("at Harbor House", "Harbor House"),
    ("at Luigi's", "Luigi's"),
    ("at the library", "library"),
    ("at the office", "office"),
    ("at the town hall", "town hall"),
    ("at the Grand Hotel", "Grand Hotel"),
    ("at the Old Mill", "Old Mill"),
    ("at the Red Lion", "Red Lion"),
    ("at the museum", "museum"),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """One filled set of slots; the pairs hold what the sentence says and what the answer says."""

    article: str
    activity: str
    person: str
    day: tuple[str, str]
    time: tuple[str, str]
    place: tuple[str, str] | None

    @property
    def answer(self) -> str:
        """The JSON that the model shall write; equal for two events exactly if they are the same appointment."""
        fields = {
            "title": f"{raise_first(self.activity)} with {self.person}",
            "day": self.day[1],
            "time": self.time[1],
            "place": self.place[1] if self.place else None,
        }
        return json.dumps(fields)

    def sentence(self, template: str) -> str:
        """Puts the event into words.

        Args:
            template: One of the wordings above.

        Returns:
            The sentence, its first letter raised.
        """
        filled = template.format(
            activity=self.activity,
            an_activity=self.article + self.activity,
            person=self.person,
            day=self.day[0],
            day_name=self.day[1],
            time=self.time[0],
            place=f" {self.place[0]}" if self.place else "",
        )
        return raise_first(filled)


@dataclass(frozen=True)
class Row:
    """One row of a file, with the name of its wording, which the file leaves out."""

    wording: str
    sentence: str
    answer: str

    def line(self) -> str:
        """Returns the row as one line of a JSON lines file."""
        messages = [{"role": "user", "content": self.sentence}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": messages}) + "\n"


def raise_first(text: str) -> str:
    """Raises the first letter only; `str.capitalize` would lower the others."""
    return text[0].upper() + text[1:]


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Picks one option; of all draws, Python promises only `random()` to stay the same across its versions."""
    return options[int(rng.random() * len(options))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """Returns the items in a random order, drawn from `random()` for the reason that `pick` gives."""
    keyed = [(rng.random(), position) for position in range(len(items))]
    return [items[position] for _, position in sorted(keyed)]


def draw_event(rng: random.Random) -> Event:
    """Draws one event; the time fits the activity."""
    article, activity, earliest, latest = pick(rng, ACTIVITIES)
    times = [time for time in TIMES if earliest <= time[1] <= latest]
    place = None if rng.random() < NO_PLACE_SHARE else pick(rng, PLACES)
    return Event(article, activity, pick(rng, PEOPLE), pick(rng, DAYS), pick(rng, times), place)


def make_rows(rng: random.Random, wordings: dict[str, str], count: int, taken: set[str]) -> list[Row]:
    """Draws rows that use the wordings equally often.

    Args:
        rng: Where the draws come from.
        wordings: Templates by name.
        count: How many rows.
        taken: Answers that are already in use; grows by the rows' own, so that no event appears twice, in any wording.

    Returns:
        The rows, in the order of the wordings.
    """
    names = list(wordings)
    rows: list[Row] = []
    while len(rows) < count:
        event = draw_event(rng)
        if event.answer in taken:
            continue
        taken.add(event.answer)
        name = names[len(rows) % len(names)]
        rows.append(Row(name, event.sentence(wordings[name]), event.answer))
    return rows


def build(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Draws the whole data set.

    Args:
        seed: Decides every draw.

    Returns:
        The training rows and the validation rows; no event is in both.
    """
    rng = random.Random(seed)
    taken: set[str] = set()
    train = make_rows(rng, TRAIN_WORDINGS, TRAIN_ROWS, taken)
    val = make_rows(rng, TRAIN_WORDINGS, VAL_ROWS - HELD_OUT_ROWS, taken)
    val += make_rows(rng, HELD_OUT_WORDINGS, HELD_OUT_ROWS, taken)
    return shuffled(rng, train), shuffled(rng, val)


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as JSON lines; the newline is fixed so that the bytes are the same on every system."""
    path.write_text("".join(row.line() for row in rows), encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes `train.jsonl` and `val.jsonl`.

    Args:
        arguments: The command line; None means the process's own.
    """
    parser = argparse.ArgumentParser(description="Write the quickstart's train.jsonl and val.jsonl.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="where; default: here")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="decides every draw; default: %(default)s")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    train, val = build(options.seed)
    write(train, options.out / "train.jsonl")
    write(val, options.out / "val.jsonl")


if __name__ == "__main__":
    main()
