import json

from qlora_lightning.report.chart import Chart, draw
from qlora_lightning.report.series import Series


def test_points_lie_where_the_axes_say():
    drawn = draw(Chart("Speed", "tokens/s", [Series("tokens/s", [(1, 0.0), (3, 50.0), (5, 100.0)])]))
    (curve,) = drawn["curves"]
    assert curve["path"] == "M0.0 1000.0L500.0 500.0L1000.0 0.0"
    assert drawn["y_ticks"] == [(100, "0"), (80, "20"), (60, "40"), (40, "60"), (20, "80"), (0, "100")]
    assert drawn["x_ticks"] == [(0, "1"), (25, "2"), (50, "3"), (75, "4"), (100, "5")]
    assert drawn["unit"] == "tokens/s"
    assert drawn["summary"] == "tokens/s: from 0 to 100, between 0 and 100."
    assert json.loads(drawn["data"]) == {
        **{"x": [1, 5], "y": [0, 100], "log": False},
        "curves": [{"label": "tokens/s", "colour": 0, "points": [[1, 0], [3, 50], [5, 100]]}],
    }


def test_a_loss_that_falls_far_gets_a_logarithmic_axis():
    drawn = draw(Chart("Loss", "nats", [Series("loss", [(1, 10.0), (2, 0.1)])], from_zero=False))
    assert drawn["unit"] == "nats · log scale"
    assert [label for _, label in drawn["y_ticks"]] == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    # the axis goes from 0.1 / 1.15 to 10 × 1.15: log(1.15) / log(132.25) = 0.0286 of it is room
    assert drawn["curves"][0]["path"] == "M0.0 28.6L1000.0 971.4"
    assert drawn["y_ticks"][3] == (50, "1")
    near = draw(Chart("Loss", "nats", [Series("loss", [(1, 2.0), (2, 0.5)])], from_zero=False))
    assert near["unit"] == "nats"


def test_a_level_goes_all_across_and_single_points_are_seen():
    series = [Series("measured", [(1, 1.0), (9, 2.0)]), Series("predicted", [(0, 3.0)], "limit"), Series("none", [])]
    drawn = draw(Chart("Memory", "GiB", series))
    measured, predicted = drawn["curves"]
    assert predicted["path"] == "M0.0 0.0L1000.0 0.0"  # where it begins says nothing of the x axis
    assert drawn["x_ticks"] == [(12.5, "2"), (37.5, "4"), (62.5, "6"), (87.5, "8")]
    single = draw(Chart("Memory", "GiB", [Series("one", [(4, 1.0)])]))
    assert single["curves"][0]["dots"] == "M500.0 0.0h0"
    assert single["x_ticks"] == [(50, "4")]
    assert not measured["dots"]


def test_nothing_to_draw_is_no_chart():
    assert draw(Chart("Loss", "nats", [Series("loss", [])])) is None


def test_axes_of_shares_stay_between_0_and_1():
    def labels(*values):
        points = list(enumerate(values))
        drawn = draw(Chart("exact match", "", [Series("val", points)], from_zero=False, are_shares=True))
        return [label for _, label in drawn["y_ticks"]]

    assert labels(1.0) == ["0.4", "0.6", "0.8", "1"]
    assert labels(0.0, 0.0) == ["0", "0.2", "0.4", "0.6"]
    assert labels(0.02, 0.9) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
