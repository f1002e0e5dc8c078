from pathlib import Path

import pytest

from tests.benchmarks.figures import Figures
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.table import (
    Goal,
    Row,
    compare_ceilings,
    compare_sides,
    compare_starts,
    rows_of_8b,
    rows_of_selective,
)

CEILING = {"seconds": 3.0, "flop": 6e9, "parts": {}}


def run(tokens: int = 1200, seconds: float = 4.0, gigabytes: float = 2.0, start: float = 6.0, **more) -> Figures:
    return Figures(tokens, seconds, int(gigabytes * 1e9), start, [1.5, 1.4], {"torch": "1"}, **more)


def test_rows_of_both_sides_are_of_medians() -> None:
    plain = {
        "ours": [run(seconds=seconds) for seconds in (3.0, 2.0, 9.0)],
        "peer": [run(seconds=seconds, gigabytes=8.0) for seconds in (12.0, 9.0, 20.0)],
    }

    speed, _, memory, _ = compare_sides(plain, {"ours": [run()]}, "cpu")

    assert (speed.ours, speed.peer, speed.ratio, speed.reached) == (400.0, 100.0, 4.0, False)
    assert (memory.ours, memory.peer, memory.ratio, memory.reached) == (2.0, 8.0, 0.25, True)


def test_without_a_peer_no_goal_over_it_is_judged() -> None:
    ours = {"ours": [run()]}

    assert [row.reached for row in compare_sides(ours, ours, "cpu")] == [None] * 4


def test_share_of_the_ceiling_is_its_seconds_over_ours() -> None:
    validation = {"tokens": 1200, "seconds": 2.0, "ceiling": {"seconds": 1.0, "flop": 2e9, "parts": {}}}
    plain = {"ours": [run(seconds=9.0, steady_seconds=4.0, ceiling=CEILING, validation=validation)]}

    checkpointing = {"ours": [run(seconds=9.0, steady_seconds=6.0, ceiling=CEILING)]}

    rows = {row.what.strip(): row for row in compare_ceilings(plain, checkpointing)}

    assert (rows["share of ceiling, plain"].ours, rows["share of ceiling, plain"].reached) == (0.75, True)
    assert rows["ceiling tokens/s, plain"].ours == 400.0
    assert rows["ceiling GFLOP/s, plain"].ours == 2.0
    assert (rows["share of ceiling, checkpointed"].ours, rows["share of ceiling, checkpointed"].reached) == (0.5, False)
    assert (rows["share of ceiling, validation"].ours, rows["share of ceiling, validation"].reached) == (0.5, False)
    assert rows["tokens/s, validation"].ours == 600.0


def test_rows_of_selective_checkpointing_are_medians_of_ours() -> None:
    speed, memory = rows_of_selective([run(seconds=seconds, gigabytes=1.5) for seconds in (2.0, 3.0, 4.0)], "cpu")

    assert (speed.ours, memory.ours) == (400.0, 1.5)


STEP = {
    **{"tokens": 512, "seconds": 8.0, "tokens_per_second": 64.0, "start_seconds": 5.0, "ceiling": CEILING},
    **{"together_bytes": 6e9, "private_bytes": 9e8, "mapped_bytes": 5e9},
}


def test_rows_of_a_part_of_an_8b_name_its_layers_and_have_no_goals() -> None:
    whole, part = rows_of_8b(STEP, 32), rows_of_8b(STEP, 2)

    assert [row.what for row in whole[:2]] == ["8B: tokens/s", "8B: private + base (GB)"]
    assert [row.what for row in part[:2]] == ["2 layers of 8B: tokens/s", "2 layers of 8B: private + base (GB)"]
    assert part[5].what == "share of ceiling, 2 layers of 8B"
    assert [row.reached for row in whole if row.goal is not None] == [True, True, True, False]
    assert not any(row.goal for row in part)


def test_start_is_divided_into_imports_and_the_rest() -> None:
    ours = [run(start=start, import_seconds=imports) for start, imports in ((5.5, 4.5), (9.0, 6.0), (5.0, 4.25))]
    start, imports, rest = compare_starts({"ours": ours, "peer": [run(start=8.0)]})

    assert (start.ratio, start.reached) == (5.5 / 8.0, True)
    assert (imports.ours, rest.ours, rest.reached) == (4.5, 1.0, True)  # of each process, not of the medians


def test_versions_that_differ_are_both_named() -> None:
    machine = describe_machine({"torch": "1"}, {"torch": "2", "trl": "3"}, "cpu")

    assert machine["versions"] == {"torch": "1", "the peer's torch": "2", "trl": "3"}


def test_rows_and_sizes_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.benchmarks.plot import draw_plot

    ours = {"ours": [run(ceiling=CEILING, steady_seconds=4.0)]}
    rows = [*compare_sides(ours, ours, "cpu"), *compare_ceilings(ours, ours), Row("other", 1.0, goal=Goal("≥", 1, ""))]
    sizes = [
        {"rows": rows, "tokens": tokens, "tokens_per_second": 300.0, "bytes_per_token": 5e5}
        for rows in ("short", "long")
        for tokens in (1024, 2048)
    ]

    draw_plot(rows, sizes, tmp_path / "figures.png")

    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
