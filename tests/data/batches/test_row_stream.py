import json

import pytest

from qlora_lightning.data.batches.stream import RowStream
from qlora_lightning.data.rows.bad_rows import BadRow
from qlora_lightning.data.rows.sources import find_sources
from qlora_lightning.support.errors import UserError


@pytest.fixture
def stream(write):
    """A stream of files a, b, … with 3, 4, … rows that say their file and number."""

    def make(*weights, position=None):
        entries = []
        for at, weight in enumerate(weights):
            file = write(f"{'abc'[at]}.jsonl", [{"is": f"{'abc'[at]}{number}"} for number in range(3 + at)])
            entries.append({"path": file, "weight": weight} if weight else file)
        return RowStream(find_sources(entries, "train"), position)

    return make


def said(taken):
    return [[row.values["is"] for row in rows] for rows in taken]


def test_at_the_end_it_begins_again(stream):
    rows = stream(None)
    assert said(rows.take(2)) == [["a0", "a1"]]
    assert said(rows.take(5)) == [["a2", "a0", "a1", "a2", "a0"]]


def test_each_source_has_its_share_evenly_spread(stream):
    rows = stream(3, 1)
    one_by_one = [said(rows.take(1)) for _ in range(8)]
    assert ["b" if taken[1] else "a" for taken in one_by_one] == list("aabaaaba")
    assert said(rows.take(4)) == [["a0", "a1", "a2"], ["b2"]]
    assert rows.drawn == [9, 3]


@pytest.mark.parametrize("before", range(9))
def test_it_goes_on_exactly_from_every_position(stream, before):
    rows = stream(2.5, 1)
    rows.take(before)
    position = rows.position()
    assert json.loads(json.dumps(position)) == position
    again = stream(2.5, 1, position=position)
    assert [said(again.take(1)) for _ in range(9)] == [said(rows.take(1)) for _ in range(9)]


def test_bad_rows_stand_in_their_places(write):
    file = write("a.jsonl", [{"is": "a0"}])
    with open(file, "a") as end:
        end.write("no json\n")
    ((first, bad, again),) = RowStream(find_sources(file, "train")).take(3)
    assert first == again
    assert isinstance(bad, BadRow)
    assert bad.where == "a.jsonl:2"


def test_once_each_row_is_given_once(stream):
    assert said(stream(3, 1).take(12, once=True)) == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]


def test_several_sources_need_weights(stream):
    with pytest.raises(UserError, match=r"data.streaming: several sources.*give each a weight"):
        stream(None, None)
