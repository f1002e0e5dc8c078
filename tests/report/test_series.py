import pytest

from qlora_lightning.report.series import running_mean, smoothing_width, thin


def test_the_running_mean_looks_back_only():
    points = [(1, 4.0), (2, 2.0), (3, 6.0), (4, 0.0)]
    assert running_mean(points, 2) == [(1, 4.0), (2, 3.0), (3, 4.0), (4, 3.0)]
    assert running_mean(points, 1) == points
    assert running_mean([], 3) == []


@pytest.mark.parametrize(("count", "width"), [(0, 1), (9, 1), (10, 5), (100, 5), (400, 20), (10_000, 100)])
def test_a_twentieth_is_averaged(count, width):
    assert smoothing_width(count) == width


def test_a_long_curve_keeps_its_ends_and_every_peak():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321], points[54_400] = (54_321, 9.0), (54_400, -9.0)
    thinned = thin(points)
    assert len(thinned) <= 600
    assert {points[0], points[54_321], points[54_400], points[-1]} <= set(thinned)
    assert thinned == sorted(thinned)


def test_a_short_curve_stays_as_it_is():
    points = [(step, 1.0 / (step + 1)) for step in range(600)]
    assert thin(points) is points
